"""A model's weights read from its safetensors files by every rank, each only the part that it keeps."""
