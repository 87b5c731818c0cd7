"""What the server's process gives up for good before it opens an image or a socket of its configuration.

Landlock then holds all of the process to the directories that the configuration names, whoever asks: a reference in an
image, a symlink, or a fault of the server's own. It binds no TCP socket to another port. What Landlock does not know a
filter of system calls refuses: to connect, to send elsewhere, to execute what is in memory, to change attributes of
files, to reach for other processes. What must be asked of others to listen is asked between the two.

Both come before the images because those are what cannot be trusted, and because Landlock holds for the threads that
are started behind it.

Directories and not files, so that images may be added, and files be exchanged, in them: a certificate that is renewed,
a configuration behind Kubernetes' `..data`. What they are cannot be changed any more. So what a reload or an added
export needs is compared with it first, and the refusal says that it takes a restart.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import stat
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nbdimg.config import ExportConfig, ServerConfig
from nbdimg.errors import ConfigError
from nbdimg.server import seccomp
from nbdimg.server.listen import ask_before_listening, is_name
from nbdimg.storage import landlock
from nbdimg.storage.landlock import Access
from nbdimg.uri import NbdUri

READ = Access.READ_FILE | Access.READ_DIR
WRITE = READ | Access.WRITE_FILE | Access.TRUNCATE
SOCKETS = Access.MAKE_SOCK | Access.REMOVE_FILE
OVERLAYS = WRITE | Access.MAKE_REG | Access.REMOVE_FILE

_WORDS = {READ: "reading", WRITE: "writing", SOCKETS: "sockets", OVERLAYS: "overlays"}

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64", "/etc/ld.so.cache")
"""Shared objects that modules load when they are first needed. Mapping them takes no right to execute."""

NAMES = ("/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/gai.conf")
"""A listener may be named `localhost`."""

CLOCK = ("/etc/localtime", "/usr/share/zoneinfo")
MIME_TYPES = ("/etc/mime.types",)
"""Python's mimetypes, which HTTP libraries import, fails when it is there and cannot be read."""

logger = logging.getLogger("nbdimg")


@dataclass(frozen=True, slots=True)
class Allowance:
    """Directories and files by their real paths, TCP ports to listen at, and names of hosts to look up for that."""

    paths: Mapping[str, Access]
    ports: frozenset[int]
    hosts: frozenset[str] = frozenset()

    def missing(self, path: str, access: Access) -> Access:
        """What of `access` is not allowed at `path`."""
        while access:
            if (granted := self.paths.get(path)) is not None:
                access &= ~granted
            if path == "/":
                break
            path = os.path.dirname(path)
        return access


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What holds since the start. `version` is Landlock's, 0 when it restricts nothing; `is_filtered`: system calls
    are; `config_path` is the file's.
    """

    mode: str
    version: int
    is_filtered: bool
    allowed: Allowance
    config_path: str | None

    def __str__(self) -> str:
        if self.mode == "off":
            return "off"
        calls = "system calls" if self.is_filtered else "no filter of system calls"
        if not self.version:
            return f"no Landlock; {calls}"
        parts = ["files"]
        if self.version >= landlock.VERSION_OF_TCP:
            parts.append("TCP")
        if self.version >= landlock.VERSION_OF_SCOPES:
            parts += ["abstract sockets", "signals"]
        return f"Landlock {self.version}: {', '.join(parts)}; {calls}"

    def check(self, needed: Allowance) -> None:
        """Raises: ConfigError: the kernel would refuse some of it, other than by saying that it is not there."""
        for path, access in needed.paths.items() if self.version else ():
            missing = self.allowed.missing(path, access)
            if missing and os.path.exists(path):
                what = next((word for kind, word in _WORDS.items() if missing in kind), _WORDS[WRITE])
                hint = "; image_directories (--image-directory) are for images to come" if missing in WRITE else ""
                raise ConfigError(_refusal(f"{path} for {what}") + hint)
        if self.version >= landlock.VERSION_OF_TCP or (self.is_filtered and not self.allowed.ports):
            for port in sorted(needed.ports - self.allowed.ports):
                raise ConfigError(_refusal(f"TCP port {port}"))
        if self.is_filtered:
            for host in sorted(needed.hosts - self.allowed.hosts):
                raise ConfigError(_refusal(f"looking up {host}"))


_current: Sandbox | None = None
"""None: nobody has confined this process. It is the process's, as what it describes is."""


def confine(config: ServerConfig, config_path: str | None = None, inherited: Collection[NbdUri] = ()) -> None:
    """Give up what serving `config` does not need, as far as the kernel can; only the mode "require" insists.

    Must be called before the process starts threads, for which it would not hold.

    Args: inherited: listeners that are open already.

    Raises:
        ConfigError: the mode is "require" and the kernel cannot.
        ListenError: one of `config`'s listeners cannot be opened.
    """
    global _current
    allowed, version, is_filtered = allowance(config, config_path), 0, False
    if config.sandbox != "off":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        landlock.give_up_privileges()
        version = landlock.version()
        if config.sandbox == "require":
            _check_version(version)
        try:
            allowed = _restricted(allowed) if version else allowed
        except OSError as error:
            if config.sandbox == "require":
                raise ConfigError(f"sandbox is require and Landlock does not work here: {error.strerror}") from None
            version = 0
        ask_before_listening(config, inherited)
        try:
            seccomp.install(has_tcp=bool(allowed.ports))
            is_filtered = True
        except OSError as error:
            if config.sandbox == "require":
                raise ConfigError(
                    f"sandbox is require and system calls cannot be filtered here: {error.strerror}"
                ) from None
    _current = Sandbox(config.sandbox, version, is_filtered, allowed, config_path)


def _check_version(version: int) -> None:
    """Raises: ConfigError."""
    if version < landlock.VERSION_OF_TCP:
        found = f"version {version} of Landlock, which restricts no TCP" if version else "no Landlock"
        raise ConfigError(
            f"sandbox is require and this kernel has {found}, expected version {landlock.VERSION_OF_TCP} (Linux 6.7) "
            "or later; auto takes what there is"
        )


def _restricted(wanted: Allowance) -> Allowance:
    """What is allowed from now on. Raises: OSError."""
    wanted = _with_program(wanted)
    return replace(wanted, paths=landlock.restrict(wanted.paths, wanted.ports))


def announce() -> None:
    """Log what restricts this process."""
    is_missed = _current is not None and _current.mode != "off" and not (_current.version and _current.is_filtered)
    logger.log(logging.WARNING if is_missed else logging.INFO, "sandbox: %s", summary())
    if os.geteuid() == 0:
        logger.warning("this runs as root, which serving does not need")


def summary() -> str:
    """What restricts this process, in a few words."""
    return "off" if _current is None else str(_current)


def check(config: ServerConfig) -> None:
    """Raises: ConfigError: serving it takes what this process has given up, or another mode."""
    if _current is None:
        return
    if config.sandbox != _current.mode:
        raise ConfigError(
            f"sandbox was {_current.mode} at the start and would be {config.sandbox}: restart nbdimg to change it"
        )
    _current.check(allowance(config, _current.config_path))


def check_export(config: ExportConfig) -> None:
    """As `check`, of one export."""
    if _current is not None:
        _current.check(Allowance(_merged(_export_needs(config)), frozenset()))


def may_read(path: str) -> bool:
    """Whether the sandbox leaves a file to be read; what its mode says is another matter."""
    try:
        if _current is not None:
            _current.check(Allowance(_merged(_around(path, READ)), frozenset()))
    except ConfigError:
        return False
    return True


def reason(error: OSError, path: str, *, for_writing: bool) -> str:
    """Why the file or directory at `path` cannot be opened. The sandbox is the reason where modes are none: a directory
    that has taken the place of one of the start has no rule.
    """
    found = error.strerror or str(error)
    if error.errno != errno.EACCES:
        return found
    if not os.access(path, os.R_OK | (os.W_OK if for_writing else 0), effective_ids=True):
        reads = for_writing and os.access(path, os.R_OK, effective_ids=True)
        return f"{found} to {'write to' if reads else 'read'} it as user {os.geteuid()}"
    if _current is not None and _current.version:
        return f"{found} by the sandbox, since its directory was exchanged after the start: restart nbdimg"
    return found


def allowance(config: ServerConfig, config_path: str | None = None) -> Allowance:
    """What serving `config` needs, and reading it again from `config_path`."""
    tcp = [(uri.host or "", uri.port) for uri in config.listeners if uri.socket is None]
    for_http = (config.admin.address if config.admin else None, config.metrics_address)
    tcp += [(each.host, each.port) for each in for_http if each is not None]
    return Allowance(
        _merged(_needs(config, config_path)),
        frozenset(port for _, port in tcp),
        frozenset(host for host, _ in tcp if is_name(host)),
    )


def _refusal(what: str) -> str:
    return f"the sandbox does not allow {what}, which the configuration at the start did not ask for: restart nbdimg"


def _merged(needs: Iterable[tuple[str, Access]]) -> dict[str, Access]:
    found: dict[str, Access] = {}
    for path, access in needs:
        found[path] = found.get(path, Access(0)) | access
    return found


def _needs(config: ServerConfig, config_path: str | None) -> Iterator[tuple[str, Access]]:
    if config_path is not None:
        yield from _around(config_path, READ)
    for export in config.exports:
        yield from _export_needs(export)
    for directory in config.image_directories:
        yield os.path.realpath(directory), WRITE
    for uri in config.listeners:
        if uri.socket is not None:
            yield _around_socket(uri.socket)
    if (admin := config.admin) is not None:
        if admin.socket_path is not None:
            yield _around_socket(admin.socket_path)
        if admin.token_path is not None:
            yield from _around(admin.token_path, READ)
    if config.tls is not None:
        for path in config.tls.paths:
            yield from _around(path, READ)


def _export_needs(config: ExportConfig) -> Iterator[tuple[str, Access]]:
    """What an image refers to may be a data file, which is written too."""
    access = READ if config.only_reads_image else WRITE
    yield from _around(config.path, access)
    for root in config.roots:
        yield os.path.realpath(root), access
    for path in (config.key_path, config.parent_path, *(key for _, key in config.key_paths)):
        if path is not None:
            yield from _around(path, READ)
    if config.overlay is not None:
        yield os.path.realpath(config.overlays_in), OVERLAYS


def _around_socket(path: str) -> tuple[str, Access]:
    return os.path.realpath(os.path.dirname(os.path.abspath(path))), SOCKETS


def _around(path: str, access: Access) -> Iterator[tuple[str, Access]]:
    """The directories in which a file lies, by its name and behind links. Of a device, and of a file in "/", itself:
    the directory would be too much.
    """
    named = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    file = os.path.join(named, os.path.basename(path))
    real = os.path.realpath(file) if os.path.islink(file) else file
    is_device = _is_block_device(real)
    for directory in {named, os.path.dirname(real)}:
        yield real if directory == "/" or is_device else directory, access


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _with_program(allowed: Allowance) -> Allowance:
    """Also what Python reads when a module is first imported, and libraries on their own. Not the working directory,
    where `python -m` finds modules too: it may hold anything.
    """
    package = str(Path(__file__).parents[1])
    modules = {os.path.abspath(each) for each in sys.path} - {os.getcwd()}
    read = {*modules, package, sys.prefix, sys.base_prefix, *LIBRARIES, *NAMES, *CLOCK, *MIME_TYPES, "/proc/self"}
    needs = [(os.path.realpath(path), READ) for path in read]
    return replace(allowed, paths=_merged([*allowed.paths.items(), *needs, (os.devnull, WRITE)]))
