"""Training: data, configuration, the trainer on top of transformers.Trainer, progress and plots."""
