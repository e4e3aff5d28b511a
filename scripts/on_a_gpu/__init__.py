"""What `scripts/on_a_gpu.sh` does: tests, parity, speed and a training on a CUDA card, in one report."""
