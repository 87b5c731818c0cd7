"""What a new image can be asked to be, and what of it goes together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from nbdimg.errors import ConfigError, escaped
from nbdimg.formats.qcow2 import structs as s
from nbdimg.units import KiB, is_power_of_two

CompressionName = Literal["zlib", "zstd"]
Preallocation = Literal["off", "metadata", "falloc", "full"]

COMPRESSIONS: tuple[str, ...] = get_args(CompressionName)
PREALLOCATIONS: tuple[str, ...] = get_args(Preallocation)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """What `qemu-img create -f qcow2 -o` can ask for. `check` says what goes together."""

    version: int = 3
    cluster_size: int = 64 * KiB
    """Bytes: a power of two from 512 to 2 MiB."""
    refcount_bits: int = 16
    has_extended_l2: bool = False
    compression: CompressionName = "zlib"
    has_lazy_refcounts: bool = False
    backing_name: str | None = None
    """Stored as it is; nothing is opened."""
    backing_format: str | None = None
    data_file_name: str | None = None
    """Stored as it is; relative to the image's directory."""
    is_data_file_raw: bool = False
    preallocation: Preallocation = "off"
    luks_passphrase: bytes | None = field(default=None, repr=False)

    @property
    def has_tables(self) -> bool:
        """Whether every guest cluster is mapped from the start; a raw data file is a whole image only then."""
        return self.preallocation != "off" or self.is_data_file_raw


def check(size: int, options: CreateOptions) -> None:
    """Refuse what cannot be made. Raises: ConfigError: one sentence."""
    cluster_size = options.cluster_size
    least, most = 1 << s.CLUSTER_BITS_MIN, 1 << s.CLUSTER_BITS_MAX
    if options.version not in (2, 3):
        raise ConfigError(f"version is {options.version}, expected 2 or 3")
    if not (is_power_of_two(cluster_size) and least <= cluster_size <= most):
        raise ConfigError(f"cluster size is {cluster_size}, expected a power of two from {least} to {most}")
    if not (is_power_of_two(options.refcount_bits) and options.refcount_bits <= 1 << s.REFCOUNT_ORDER_MAX):
        raise ConfigError(f"refcount bits are {options.refcount_bits}, expected 1, 2, 4, 8, 16, 32 or 64")
    if options.compression not in COMPRESSIONS:
        raise ConfigError(f"compression type is {escaped(options.compression)}, expected {' or '.join(COMPRESSIONS)}")
    if options.preallocation not in PREALLOCATIONS:
        raise ConfigError(
            f"preallocation is {escaped(options.preallocation)}, expected one of {', '.join(PREALLOCATIONS)}"
        )
    _check_version_2(options)
    extended_min = 1 << s.CLUSTER_BITS_EXTENDED_MIN
    if options.has_extended_l2 and cluster_size < extended_min:
        raise ConfigError(f"cluster size is {cluster_size}, expected at least {extended_min} with extended L2 entries")
    _check_names(options)
    _check_together(options)
    _check_size(size, options)


def _check_version_2(options: CreateOptions) -> None:
    if options.version != 2:
        return
    wants = {
        "extended L2 entries": options.has_extended_l2,
        "lazy refcounts": options.has_lazy_refcounts,
        f"refcounts of {options.refcount_bits} bits": options.refcount_bits != 16,
        f"{options.compression} compression": options.compression != "zlib",
        "an external data file": options.data_file_name is not None,
        "preallocation under encryption": options.luks_passphrase is not None and options.has_tables,
    }
    for what, is_wanted in wants.items():
        if is_wanted:
            raise ConfigError(f"version is 2, expected 3 for {what}")


def _check_names(options: CreateOptions) -> None:
    if options.backing_name is not None:
        _check_text("backing file name", options.backing_name, s.BACKING_NAME_MAX)
        if options.backing_format is None:
            raise ConfigError("the backing file's format is not given, and it is never guessed: --backing-format")
        _check_text("backing format", options.backing_format, s.BACKING_FORMAT_MAX)
    elif options.backing_format is not None:
        raise ConfigError("a backing format is given, and no backing file")
    if options.data_file_name is not None:
        _check_text("data file name", options.data_file_name, s.BACKING_NAME_MAX)
        if ":" in options.data_file_name.partition("/")[0]:
            name = options.data_file_name
            raise ConfigError(
                f"the data file name {escaped(name)} has a protocol, expected a file, as {escaped(f'./{name}')} is one"
            )
    elif options.is_data_file_raw:
        raise ConfigError("a raw data file is asked for, and no data file is named")


def _check_text(what: str, text: str, bytes_max: int) -> None:
    """What a reader accepts: printable UTF-8 of a bounded length."""
    if not text.isprintable():
        raise ConfigError(f"the {what} {escaped(text)} is not printable UTF-8")
    length = len(text.encode())
    if not 1 <= length <= bytes_max:
        raise ConfigError(f"the {what} has {length} bytes, expected 1 to {bytes_max}")


def _check_together(options: CreateOptions) -> None:
    if options.backing_name is not None:
        if options.is_data_file_raw:
            raise ConfigError("a raw data file holds the whole image, so it cannot have a backing file")
        if options.preallocation != "off" and not options.has_extended_l2:
            raise ConfigError("preallocation would hide the backing file, but with extended L2 entries")
    if options.luks_passphrase is not None:
        if not options.luks_passphrase:
            raise ConfigError("the passphrase is empty")
        if not _is_text(options.luks_passphrase):
            raise ConfigError("the passphrase is not UTF-8 text without NUL, and QEMU takes no other")
        if options.is_data_file_raw:
            raise ConfigError("an encrypted data file is not a raw image, so it cannot be marked as one")


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


def _check_size(size: int, options: CreateOptions) -> None:
    l2_entries = options.cluster_size // (16 if options.has_extended_l2 else 8)
    size_max = min(s.SIZE_MAX, s.L1_BYTES_MAX // 8 * l2_entries * options.cluster_size)
    if not 0 <= size <= size_max:
        raise ConfigError(
            f"size is {size}, expected 0 to {size_max} with clusters of {options.cluster_size} bytes"
            f"{' and extended L2 entries' if options.has_extended_l2 else ''}"
        )
