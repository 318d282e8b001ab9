"""What upscaling and the dataset tools share for reading videos: converting frames. No torch."""

from __future__ import annotations

from typing import Any

from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorTrc, VideoReformatter

# swscale's flags, which PyAV names from version 18 on.
SMOOTH = 0x4 | 0x2000 | 0x40000
"""BICUBIC, FULL_CHR_H_INT and ACCURATE_RND: chroma is interpolated at full precision."""
BITEXACT = 0x80000
"""The same bytes on every processor."""
UNKNOWN_MATRIX = 2
"""H.273's code for an unspecified matrix; the same for primaries and transfer characteristics."""


def reformat(
    frame: VideoFrame, reformatter: VideoReformatter | None = None, **options: Any
) -> VideoFrame:
    """Convert a frame as `VideoFrame.reformat` does, whatever its primaries and transfer say.

    PyAV 17 passes both tags on to swscale, which refuses reserved values; they are hidden here, and
    the result has none.
    """
    tags = frame.color_primaries, frame.color_trc
    frame.color_primaries, frame.color_trc = ColorPrimaries.UNSPECIFIED, ColorTrc.UNSPECIFIED
    try:
        return (reformatter or VideoReformatter()).reformat(frame, **options)
    finally:
        frame.color_primaries, frame.color_trc = tags
