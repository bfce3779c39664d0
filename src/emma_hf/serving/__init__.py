"""An OpenAI-compatible server for one EMMA (`emma-hf serve`)."""
