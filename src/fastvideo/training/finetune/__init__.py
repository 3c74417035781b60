"""Fine-tuning of Wan checkpoints, to Video Sparse Attention or dense, on latents and text embeddings, on one device or many."""
