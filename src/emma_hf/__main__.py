"""`python -m emma_hf` is the `emma-hf` command: `accelerate launch -m emma_hf train …` starts it in many processes."""

from .cli import main

raise SystemExit(main())
