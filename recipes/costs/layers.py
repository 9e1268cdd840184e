"""Parameters, FLOPs and what is kept for the backward pass: of layers, and of the networks that are made of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from recipes.sections.model import Model

CHANNELS = 3  # of an image


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a network and one image; `a + b` is both, `a.used(n)` the same weights for n inputs of that kind.

    FLOPs are those of matrix products and of attention, a multiplication and an addition being two, as
    torch.utils.flop_counter counts them; norms, activations and optimizers are not counted, as is custom for MFU.
    """

    parameters: float = 0  # numbers that are trained
    matrices: float = 0  # of them those of matrix products, which autocast copies to 16 bits
    flops: float = 0  # of the forward pass
    no_input_gradient: float = 0  # of them those whose input needs no gradient: images
    wide: float = 0  # numbers kept for the backward pass in 32 bits, unless parameters have 16
    narrow: float = 0  # numbers kept in the precision of matrix products

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def used(self, times: float) -> Cost:
        """With all its weights once, and everything that depends on the input `times` over."""
        return Cost(
            parameters=self.parameters,
            matrices=self.matrices,
            flops=self.flops * times,
            no_input_gradient=self.no_input_gradient * times,
            wide=self.wide * times,
            narrow=self.narrow * times,
        )

    def again(self) -> Cost:
        """A second use of weights that are counted already."""
        return Cost(flops=self.flops, no_input_gradient=self.no_input_gradient, wide=self.wide, narrow=self.narrow)

    @property
    def backward(self) -> float:
        """FLOPs of the backward pass: a product for the gradient of the weights, and one for that of the input."""
        return 2 * self.flops - self.no_input_gradient


def total(*costs: Cost) -> Cost:
    return sum(costs, Cost())


def linear(rows: float, into: int, out: int, *, bias: bool = True) -> Cost:
    """A linear layer for so many rows; it keeps its input."""
    return Cost(
        parameters=into * out + bias * out, matrices=into * out, flops=2 * rows * into * out, narrow=rows * into
    )


def layer_norm(rows: float, width: int) -> Cost:
    """It keeps its input, and mean and deviation of every row."""
    return Cost(parameters=2 * width, wide=rows * (width + 2))


def attention(tokens: int, width: int, num_heads: int) -> Cost:
    """Scaled dot products without the projections, by a fused kernel: no table of tokens x tokens is kept.

    Queries, keys and values, and a sum per row and head; its output is kept by the projection that follows.
    """
    return Cost(flops=4 * tokens**2 * width, narrow=3 * tokens * width, wide=num_heads * tokens)


def block(tokens: int, width: int, num_heads: int, mlp_ratio: float) -> Cost:
    """A transformer block of timm: norm, attention, norm, two layers with an activation that keeps its input."""
    hidden = int(width * mlp_ratio)
    return total(
        layer_norm(tokens, width).used(2) + Cost(parameters=2 * width),
        linear(tokens, width, 3 * width),
        attention(tokens, width, num_heads),
        linear(tokens, width, width),
        linear(tokens, width, hidden),
        Cost(narrow=tokens * hidden),
        linear(tokens, hidden, width),
    )


def beit_block(model: Model, tokens: int, grid: int) -> Cost:
    """A block of timm's BEiT: keys without bias, scaled branches, a table of relative positions.

    A bias of attention, [heads, tokens, tokens], is the same for all images and not counted as theirs.
    """
    width, scales = model.embed_dim, bool(model.init_values)
    table = model.rel_pos_bias * relative_positions(grid) * model.num_heads
    extra = Cost(parameters=-width + 2 * width * scales + table, narrow=2 * tokens * width * scales)
    return block(tokens, width, model.num_heads, model.mlp_ratio) + extra


def relative_positions(grid: int) -> int:
    """Rows of a table of relative positions: differences in a square grid, and three for the class token."""
    return (2 * grid - 1) ** 2 + 3


def patch_embedding(model: Model, patches: int) -> Cost:
    """Of so many patches: the image itself needs no gradient."""
    layer = linear(patches, CHANNELS * model.patch_size**2, model.embed_dim)
    return layer + Cost(no_input_gradient=layer.flops)


def vit(model: Model, patches: int) -> Cost:
    """timm's ViT that sees so many patches, behind a class token; sine-cosine positions are not trained."""
    tokens, width = 1 + patches, model.embed_dim
    layers = [block(tokens, width, model.num_heads, model.mlp_ratio)] * model.depth
    return total(patch_embedding(model, patches), Cost(parameters=width), *layers, layer_norm(tokens, width))


def beit(model: Model, grid: int) -> Cost:
    """timm's BEiT on all patches, without the mask token."""
    patches, width = grid**2, model.embed_dim
    positions = model.shared_rel_pos_bias * relative_positions(grid) * model.num_heads
    positions += model.abs_pos_emb * (1 + patches) * width
    layers = [beit_block(model, 1 + patches, grid)] * model.depth
    last = layer_norm(1 + patches, width)
    return total(patch_embedding(model, patches), Cost(parameters=width + positions), *layers, last)


def perceptron(rows: float, width: int, *, hidden: int, depth: int, norm: str) -> Cost:
    """`depth` linear layers without bias and what stands between them (LUT's projector and predictor)."""
    cost = Cost()
    for index in range(depth):
        last = index == depth - 1
        cost += linear(rows, width if index == 0 else hidden, width if last else hidden, bias=False)
        if not last:
            cost += Cost(parameters=2 * hidden * (norm != "none"), wide=3 * rows * hidden)
    return cost
