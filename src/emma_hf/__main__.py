"""`python -m emma_hf` is the `emma-hf` command: `accelerate launch -m emma_hf train …` starts it in many processes."""

from .cli.main import main

raise SystemExit(main())
