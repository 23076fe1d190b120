"""Recovery: short training of a compressed model, by distillation from the original or on text."""
