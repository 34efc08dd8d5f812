"""One ViT structure per file: its pattern and the roles of its parts."""
