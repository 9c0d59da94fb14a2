"""The NVAE model, its configuration and its published settings."""
