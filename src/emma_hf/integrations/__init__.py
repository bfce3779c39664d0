"""EMMA in the engines and tools of others."""
