"""Training: data, pretraining, sweeps, and recovery of compressed models, on the Hugging Face Trainer."""
