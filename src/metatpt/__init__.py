"""Meta test-time prompt tuning of CLIP-like models, on PyTorch Lightning."""
