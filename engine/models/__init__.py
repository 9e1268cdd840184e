"""Networks: timm's Vision Transformers with masking, and what is put on top of them."""
