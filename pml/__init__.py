"""How much a LoRA adapter can memorise word for word, and training that makes it recall word for word."""
