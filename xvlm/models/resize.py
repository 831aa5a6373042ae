"""Position tables at another image size, by the reference's two rules.

Swin's relative position biases follow a cubic spline on geometrically spaced nodes (X-VLM
``interpolate_relative_pos_embed``, taken from BEiT), absolute positions a bicubic resize (``interpolate_pos_embed``).
Neither may be replaced by the other or by timm's own resize, which is linear without SciPy: on tables of unit scale the
results differ by as much as the table's own values.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

State = dict[str, Tensor]
Grid = tuple[int, int]  # rows and columns of patches


def fit_tables(state: State, target: State, grids: tuple[Grid, Grid] | None = None) -> tuple[State, list[str]]:
    """Resize the position tables of a state dict to the shapes of another; every other tensor is passed on as it is.

    Args:
        state: with timm's names for the tables, ``…relative_position_bias_table`` and ``…pos_embed``, and ours for
            those added behind a trunk, ``vision.positions``.
        target: tensors of the wanted shapes; those on the meta device will do.
        grids: of the patches before and after, which absolute positions are of; if not given, squares behind one class
            token, which is what official files have.

    Returns:
        The state dict, and the names of the tables that changed.

    Raises:
        ValueError: a table that is not one of its grid or of a square window, by name.
    """
    fitted, resized = dict(state), []
    # A grid may turn and its table keep its shape; one of the same shape for more patches or fewer is of no grid.
    turned = grids is not None and grids[0] != grids[1] and math.prod(grids[0]) == math.prod(grids[1])
    for name, table in state.items():
        if name not in target:
            continue
        same = table.shape == target[name].shape
        try:
            if name.endswith("relative_position_bias_table") and not same:
                fitted[name] = relative_positions(table, _offsets_side(len(target[name])) // 2 + 1)
            elif name.endswith(("pos_embed", "vision.positions")) and (turned or not same):
                known, wanted = grids or (_square(table), _square(target[name]))
                fitted[name] = absolute_positions(table, known, wanted)
            else:
                continue
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        resized.append(name)
    return fitted, resized


def relative_positions(table: Float[Tensor, "offset head"], window: int) -> Float[Tensor, "new_offset head"]:
    """Relative position biases for windows of ``window`` x ``window``.

    The (2w - 1)^2 known offsets are taken to lie at 0, ±1, ±(1 + q), ±(1 + q + q²), …, with q such that they reach as
    far as the new ones; an interpolating bicubic spline through them is read at whole offsets. Computed in float64.

    Raises:
        ValueError: the table is not that of a square window, or the window is too small for a cubic.
    """
    known, wanted = _offsets_side(len(table)), 2 * window - 1
    if known == wanted:
        return table.clone()
    if known < 5:
        raise ValueError(f"windows of {known // 2 + 1} are too small for cubic interpolation to windows of {window}")
    nodes = geometric_nodes(known // 2, wanted // 2)
    at = torch.arange(-(wanted // 2), wanted // 2 + 1, dtype=torch.float64)
    read = _spline_matrix(nodes, at)
    grid = rearrange(table.double(), "(row column) head -> head row column", row=known)
    return rearrange(read @ grid @ read.T, "head row column -> (row column) head").to(table.dtype)


def geometric_nodes(known: int, wanted: int) -> Float[Tensor, "node"]:
    """0 and ``known`` nodes on either side at geometrically growing distance, the last near ``wanted``.

    The ratio is bisected between 1.01 and 1.5 to 1e-6 as in the reference, whose last midpoint (and not the nearer end)
    is used: another choice moves the result by 1e-6.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1.0 - ratio**known) / (1.0 - ratio) > wanted:
            high = ratio
        else:
            low = ratio
    right, step = [], 1.0
    for i in range(known):
        right.append(step)
        step += ratio ** (i + 1)
    return torch.tensor([*(-x for x in reversed(right)), 0.0, *right], dtype=torch.float64)


def absolute_positions(
    table: Float[Tensor, "*one token dim"], known: Grid, wanted: Grid
) -> Float[Tensor, "*one new_token dim"]:
    """Positions of a grid of patches, resized from ``known`` to ``wanted``; those of tokens before them stay.

    Raises:
        ValueError: the table has fewer positions than the grid.
    """
    if known == wanted:
        return table.clone()
    before = table.shape[-2] - known[0] * known[1]
    if before < 0 or table.shape[:-2].numel() != 1:
        raise ValueError(f"a table of shape {tuple(table.shape)} holds no positions of {known[0]} x {known[1]} patches")
    first, patches = table[..., :before, :], table[..., before:, :]
    grid = rearrange(patches.reshape(-1, table.shape[-1]), "(row column) dim -> 1 dim row column", row=known[0])
    grid = F.interpolate(grid.float(), size=wanted, mode="bicubic", align_corners=False).to(table.dtype)
    resized = rearrange(grid, "1 dim row column -> (row column) dim")
    return torch.cat([first, resized.view(*table.shape[:-2], *resized.shape)], -2)


def _spline_matrix(nodes: Float[Tensor, "node"], at: Float[Tensor, "point"]) -> Float[Tensor, "point node"]:
    """Weights of values at the nodes in the interpolating cubic spline at some points.

    FITPACK's spline, which the reference calls through SciPy: the second and the last but one node are no knots, and
    beyond the last node the value stays as it is there.
    """
    knots = torch.cat([nodes[:1].repeat(4), nodes[2:-2], nodes[-1:].repeat(4)])
    inside = at.clamp(nodes[0].item(), nodes[-1].item())
    return torch.linalg.solve(_b_splines(knots, nodes).T, _b_splines(knots, inside).T).T


def _b_splines(knots: Float[Tensor, "knot"], at: Float[Tensor, "point"]) -> Float[Tensor, "point spline"]:
    """Values of all cubic B-splines on the knots (Cox and de Boor's recursion)."""
    x = at[:, None]
    values = ((knots[:-1] <= x) & (x < knots[1:])).double()
    values[at == knots[-1], -4] = 1.0  # the last interval is closed on both sides
    for degree in range(1, 4):
        left, right = knots[: -degree - 1], knots[degree + 1 :]
        rise, fall = knots[degree:-1] - left, right - knots[1:-degree]
        # Where knots coincide the spline below is zero, and so is its share.
        up = torch.where(rise > 0, (x - left) / rise.clamp(min=1e-300), 0.0)
        down = torch.where(fall > 0, (right - x) / fall.clamp(min=1e-300), 0.0)
        values = up * values[:, :-1] + down * values[:, 1:]
    return values


def _offsets_side(offsets: int) -> int:
    side = round(offsets**0.5)
    if side**2 != offsets or side % 2 == 0:
        raise ValueError(f"a table of {offsets} relative positions is not that of a square window")
    return side


def _square(table: Tensor) -> Grid:
    patches = table.shape[-2] - 1
    side = round(patches**0.5)
    if side**2 != patches:
        raise ValueError(f"positions of {patches} patches are not those of a square grid and one class token")
    return side, side
