"""Some consecutive headers of a tar and what they say, collected one by one and checked together (tars.py)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from shards.layout import TAR_BLOCK

# Where a file lies: first byte of its first header, first byte of its data, bytes of data, and the data's beginning,
# as much of it as came with the header (all, if it is small).
Place = tuple[int, int, int, bytes]
NOWHERE = -1


@dataclass(slots=True)
class Stretch:
    """What one stretch of a tar holds, as it is found."""

    blocks: list[bytes] = field(default_factory=list)  # all headers
    files: list[Place] = field(default_factory=list)
    others: list[tuple[int, int]] = field(default_factory=list)  # (row, place in the tar) of headers that are no file's
    long_name: dict[int, bytes] = field(default_factory=dict)  # by file: names that do not fit into its header
    long_size: list[int] = field(default_factory=list)  # files whose size does not stand in their header
    begin: int = NOWHERE  # first byte of the first extended header of the next file
    contents: list[bytes] = field(default_factory=list)  # of extended headers
    pending: dict[bytes, bytes] = field(default_factory=dict)  # name or size of the next file, from extended headers

    def add(self, header: bytes, data: int, size: int, content: bytes) -> None:
        """A file whose data begin at byte `data`, with the extended headers before it."""
        begin = data - TAR_BLOCK if self.begin == NOWHERE else self.begin
        self.blocks.append(header)
        self.files.append((begin, data, size, content))
        self.begin = NOWHERE

    def add_extended(self, header: bytes, position: int, begins: bool) -> None:
        """A pax or GNU header; the next file begins with it, unless it is for all files."""
        self.others.append((len(self.blocks), position))
        self.blocks.append(header)
        if begins and self.begin == NOWHERE:
            self.begin = position

    def add_folder(self, header: bytes, position: int) -> None:
        """A folder; extended headers before it were about it."""
        self.others.append((len(self.blocks), position))
        self.blocks.append(header)
        self.begin = NOWHERE
        self.pending.clear()

    def place(self, row: int) -> int:
        """Where a header lies in the tar."""
        before = bisect_left(self.others, (row, 0))
        if before < len(self.others) and self.others[before][0] == row:
            return self.others[before][1]
        return self.files[row - before][1] - TAR_BLOCK
