"""The sizes of the Vision Transformer family (Dosovitskiy et al., 2021; Touvron et al., 2021), patch 16."""

from recipes.schema import Model

VIT_S = Model(embed_dim=384, depth=12, num_heads=6)
VIT_B = Model(embed_dim=768, depth=12, num_heads=12)
VIT_L = Model(embed_dim=1024, depth=24, num_heads=16)
