"""Index arithmetic of video token grids (T, Y, X): the only place that knows how tokens lie in space and time."""

from fastvideo.video.pooling import tile_mean, tile_sum
from fastvideo.video.tiles import TileGrid, TileTensors

__all__ = ["TileGrid", "TileTensors", "tile_mean", "tile_sum"]
