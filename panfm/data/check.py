"""The check a site runs before anything is trained: every row of the manifest, every image, every mask.

It reads the manifest, then all of each image once, header and voxels (a truncated file or a NaN hides behind a sound
header), prepares it as the run would, and reads each mask. It writes nothing. Two images are the same if their decoded
content is, however they are packed.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from panfm.anatomy import parse_stream
from panfm.config import SiteConfig, StreamConfig, load_site
from panfm.data.check_outputs import Output, inspect_output, out_of_line
from panfm.data.content import content_digest
from panfm.data.manifest import Fault, Row, image_path, scan_manifest
from panfm.data.readers import ImageError, find_reader, read_source
from panfm.errors import LimitError

_THREADS = 4


@dataclass(frozen=True)
class SiteReport:
    """Sound and faulty images of a site."""

    site: str
    faults: tuple[Fault, ...]
    rows: tuple[Row, ...]
    """Sound rows, of all streams."""
    unused: tuple[str, ...]
    """Streams of sound rows that the run does not read."""
    notes: tuple[tuple[str, str], ...] = ()
    """(path of an image that is not at fault, what is unusual about it)"""
    contents: Mapping[bytes, Row] = field(default_factory=dict)
    """Hash of an image's content -> its row."""
    all_rows: tuple[Row, ...] = ()
    """Rows of the manifest whose images were read, sound or not."""

    @property
    def coverage(self) -> Mapping[tuple[str, str], int]:
        """(stream, split) -> subjects among the sound rows."""
        return Counter(
            (stream, split) for _, stream, split in {(row.subject, row.stream, row.split) for row in self.rows}
        )


@dataclass(frozen=True)
class _Inspected:
    """One sound image."""

    digest: bytes
    output: Output
    notes: tuple[str, ...]


def check_site(
    folder: Path,
    streams: Mapping[str, StreamConfig] | None = None,
    *,
    organs: Collection[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SiteReport:
    """Check everything a site would train on; faults come back as data.

    Guarantees:
        seen: an image that comes out constant, or not finite, is at fault.
    Args:
        folder: The site folder.
        streams: Streams of the run to check against, as which the images are prepared. Without it, an image may be a
            volume or a picture, and is scaled but not resampled.
        organs: Organs of the run; a stream of another organ is a fault, while a stream of a known organ that the run
            does not read is only `unused`. Without it, any `<organ>-<modality>` passes.
        progress: Called with (images done, images in all).
    Raises:
        ConfigError: `site.toml` does not hold.
    """
    site = load_site(folder)
    rows, faults = scan_manifest(folder, site)
    all_faults = [*faults]
    contents: dict[bytes, Row] = {}
    sound: dict[Row, _Inspected] = {}
    for done, (row, outcome) in enumerate(_inspect_all(folder, site, rows, streams or {}, organs), start=1):
        if isinstance(outcome, Fault):
            all_faults.append(outcome)
        elif (twin := contents.setdefault(outcome.digest, row)) is not row:
            all_faults.append(Fault(row.path, f"the same content as {twin.path}", "an image of its own", row))
        else:
            sound[row] = outcome
        if progress:
            progress(done, len(rows))
    unused = sorted({row.stream for row in sound} - set(streams or {})) if streams else []
    return SiteReport(site.name, tuple(all_faults), tuple(sound), tuple(unused), _notes(sound), contents, rows)


def _notes(sound: Mapping[Row, _Inspected]) -> tuple[tuple[str, str], ...]:
    notes = [(row.path, note) for row, inspected in sound.items() for note in inspected.notes]
    for stream in sorted({row.stream for row in sound}):
        outputs = {row: inspected.output for row, inspected in sound.items() if row.stream == stream}
        notes += [(row.path, note) for row, note in out_of_line(outputs)]
    return tuple(notes)


def _inspect_all(
    folder: Path,
    site: SiteConfig,
    rows: tuple[Row, ...],
    streams: Mapping[str, StreamConfig],
    organs: Collection[str] | None,
) -> Iterator[tuple[Row, Fault | _Inspected]]:
    def inspect(row: Row) -> Fault | _Inspected:
        organ, _ = parse_stream(row.stream)
        if organs is not None and organ not in organs:
            return Fault(row.path, f"unknown stream {row.stream!r}", f"an organ of {', '.join(organs)}", row)
        return _inspect(folder, site, row, streams.get(row.stream))

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from zip(rows, pool.map(inspect, rows), strict=True)


def _inspect(folder: Path, site: SiteConfig, row: Row, config: StreamConfig | None) -> Fault | _Inspected:
    """The first fault of one row's image and mask, or what there is to know of the image."""
    path, file = image_path(folder, site, row.path), f"{Path(site.manifest).name}:{row.line}: {row.path}"
    try:
        reader = find_reader(path)
        file = row.path
        is_volume, nan = (config.is_volume, config.nan) if config else (None, None)
        image = read_source(path, is_volume=is_volume, reader=reader, nan=nan)
        output, notes = inspect_output(image, row.stream, config)
        if row.mask:
            file = row.mask
            from panfm.data.masks import check_mask  # imported here: few sites have masks

            check_mask(image_path(folder, site, row.mask), image)
        return _Inspected(content_digest(image), output, notes)
    except ImageError as error:
        return Fault(file, error.given, error.expected, row)
    except MemoryError as error:
        raise LimitError(f"{file}: needs more memory than there is") from error
