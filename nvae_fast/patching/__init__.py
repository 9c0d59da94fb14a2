"""What ``nvae_fast.accelerate`` is made of: forwards that are bound to foreign modules, recognising, verifying."""
