"""How many columns a factor pair trains and how many it may ever hold."""

PAPER_BUFFER = 100
PAPER_SMALLEST_WIDTH = 768


def default_buffer(min_dim: int) -> int:
    """Buffer columns b of a linear whose smaller dimension is `min_dim`.

    The paper trains 100 at widths 768, 1024 and 1280. A narrower layer keeps the proportion of the smallest
    of these, 100 / 768; at least one column, since without a buffer no rank ever grows.
    """
    return max(1, min(PAPER_BUFFER, round(min_dim * PAPER_BUFFER / PAPER_SMALLEST_WIDTH)))


def default_capacity(min_dim: int, *, initial_rank: int, buffer: int) -> int:
    """Columns (r + b) that are allocated for a linear whose smaller dimension is `min_dim`.

    Half the smaller dimension, the cap of the authors' released code; more only if the first r + b columns
    need it, and never more than the dimension itself.
    """
    return min(min_dim, max(min_dim // 2, initial_rank + buffer))
