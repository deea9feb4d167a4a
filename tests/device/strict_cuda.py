"""A strict stand-in for CUDA on a CPU build of torch; `strict_cuda.cpp` says what it does.

    python -m pytest -p strict_cuda -m gpu      # with this folder in PYTHONPATH

It has to be there before torch is, so it needs a process of its own. Inside: `watch` counts
launches and waits by place, `memory_of` and `failing` let memory run out,
`torch.cuda.set_sync_debug_mode("error")` makes waits errors.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from strict_build import built

TOTAL = 80 << 30
LAUNCH, WAIT = range(2)


if "torch" in sys.modules:
    raise ImportError("strict_cuda: import it before torch")
_library = ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p)
for _name in ("live", "peak", "limit", "get_state"):
    getattr(_library, f"strict_{_name}").restype = ctypes.c_long
_library.strict_initial_seed.restype = ctypes.c_ulonglong
_library.strict_set_limit.argtypes = [ctypes.c_long]
_library.strict_fail.argtypes = [ctypes.c_long, ctypes.c_long]
_library.strict_seed.argtypes = [ctypes.c_int, ctypes.c_ulonglong]
_library.strict_get_state.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_long]
_library.strict_set_state.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_long]


def _number(device: Any = None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return torch._C._accelerator_getDeviceIndex() if index is None else index


# ------------------------------------------------------------------------------------------
# torch.cuda for Python
class _Stream:
    device, cuda_stream, stream_id = torch.device("cuda", 0), 0, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self, *_: Any) -> None:
        _library.strict_count(b"synchronize")

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    wait_stream = wait_event = wait = record = __exit__


class _Event(_Stream): ...


class _Properties:
    name, major, minor, total_memory, multi_processor_count = "strict device", 9, 0, TOTAL, 132
    warp_size, L2_cache_size = 32, 50 << 20


class _Device:
    def __init__(self, device: Any) -> None:
        self.index = _number(device)

    def __enter__(self) -> None:
        self.before = _number()
        torch._C._accelerator_setDeviceIndex(self.index)

    def __exit__(self, *_: Any) -> None:
        torch._C._accelerator_setDeviceIndex(self.before)


def _limit() -> int:
    return _library.strict_limit() or TOTAL


def _get_state(device: Any = "cuda") -> torch.Tensor:
    state = torch.empty(
        _library.strict_get_state(_number(device), None, 0), dtype=torch.uint8, device="cpu"
    )
    _library.strict_get_state(_number(device), state.data_ptr(), state.numel())
    return state


def _set_state(state: torch.Tensor, device: Any = "cuda") -> None:
    state = state.cpu().contiguous()
    _library.strict_set_state(_number(device), state.data_ptr(), state.numel())


def _seed(seed: int, device: Any = None) -> None:
    _library.strict_seed(_number(device), int(seed) % 2**64)


def _waits_raise(mode: str | int) -> None:
    _library.strict_waits_raise(int(mode in ("error", 2)))


_N = _library.strict_devices()
_RANDOM = {
    "manual_seed": _seed,
    "manual_seed_all": lambda seed: [_seed(seed, i) for i in range(_N)],
    "initial_seed": lambda: _library.strict_initial_seed(_number()),
    "seed": lambda: None,
    "seed_all": lambda: None,
    "get_rng_state": _get_state,
    "set_rng_state": _set_state,
    "get_rng_state_all": lambda: [_get_state(i) for i in range(_N)],
    "set_rng_state_all": lambda states: [_set_state(state, i) for i, state in enumerate(states)],
}
_MEMORY = {
    "mem_get_info": lambda device=None: (_limit() - _library.strict_live(), _limit()),
    "memory_allocated": lambda device=None: _library.strict_live(),
    "max_memory_allocated": lambda device=None: _library.strict_peak(),
    "reset_peak_memory_stats": lambda device=None: _library.strict_reset_peak(),
    "memory_stats": lambda device=None: {},
    "empty_cache": lambda: None,
}
_CUDA = {
    "_lazy_init": lambda: None,
    "_initialized": True,
    "_is_compiled": lambda: True,
    "_device_count_nvml": lambda: _N,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "is_current_stream_capturing": lambda: False,
    "device_count": lambda: _N,
    "current_device": _number,
    "set_device": lambda device: torch._C._accelerator_setDeviceIndex(_number(device)),
    "device": _Device,
    "synchronize": lambda device=None: _library.strict_count(b"synchronize"),
    "get_device_name": lambda device=None: _Properties.name,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: _Properties(),
    "can_device_access_peer": lambda *_: True,
    "Stream": _Stream,
    "Event": _Event,
    "current_stream": lambda device=None: _Stream(),
    "default_stream": lambda device=None: _Stream(),
    "stream": lambda stream: nullcontext(),
    "set_stream": lambda stream: None,
    "ipc_collect": lambda: None,
    "set_sync_debug_mode": _waits_raise,
    "default_generators": (),
}
_PRIVATE = {
    "_cuda_getDeviceCount": lambda: _N,
    "_cuda_isInBadFork": lambda: False,
    "_cuda_getDevice": _number,
    "_cuda_exchangeDevice": lambda device: 0,
    "_cuda_maybeExchangeDevice": lambda device: 0,
    "_cuda_clearCublasWorkspaces": lambda: None,
    "_cuda_getCurrentRawStream": lambda device: 0,
    "_cuda_isCurrentStreamCapturing": lambda: False,
}
for _place, _found in (
    (torch.cuda, {**_CUDA, **_RANDOM, **_MEMORY}),
    (torch.cuda.random, _RANDOM),
    (torch.cuda.memory, _MEMORY),
    (torch.cuda.streams, {"Stream": _Stream, "Event": _Event}),
    (torch._C, {name: value for name, value in _PRIVATE.items() if not hasattr(torch._C, name)}),
):
    for _name, _value in _found.items():
        setattr(_place, _name, _value)

_new_storage = torch._C.StorageBase.__new__


def _storage(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
    if (
        device is not None
        and torch.device(device).type == "cuda"
        and (not args or isinstance(args[0], int))
    ):
        return torch.empty(*args or [0], dtype=torch.uint8, device=device).untyped_storage()
    return _new_storage(cls, *args, **kwargs, **({} if device is None else {"device": device}))


torch.UntypedStorage.__new__ = staticmethod(_storage)


# ------------------------------------------------------------------------------------------
# for tests
class Watch:
    """Launches and waits, by operator and by the innermost line of `package` that asked."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.launches = Counter()
        self.waits = Counter()

    def note(self, kind: int, op: bytes) -> None:
        counts = self.waits if kind == WAIT else self.launches
        counts[f"{op.decode()} at {self.place()}"] += 1

    def place(self) -> str:
        frame = sys._getframe()
        while frame is not None:
            name = frame.f_code.co_filename
            if self.package in name:
                return f"{name.rsplit(self.package, 1)[1]}:{frame.f_lineno}"
            frame = frame.f_back
        return "elsewhere"

    @property
    def n_launches(self) -> int:
        return self.launches.total()

    @property
    def n_waits(self) -> int:
        return self.waits.total()


_watches = []


@_CALLBACK
def _note(kind: int, op: bytes) -> None:
    for watch in _watches:
        watch.note(kind, op)


_NOTHING = ctypes.cast(None, _CALLBACK)


@contextmanager
def watch(package: str = "lightning_nrl/") -> Iterator[Watch]:
    """Counts what goes on inside."""
    found = Watch(package)
    _watches.append(found)
    _library.strict_callback(_note)
    try:
        yield found
    finally:
        _watches.remove(found)
        if not _watches:
            _library.strict_callback(_NOTHING)


@contextmanager
def memory_of(n_bytes: int) -> Iterator[None]:
    """A device that has so much more memory than is in use now."""
    _library.strict_set_limit(_library.strict_live() + n_bytes)
    try:
        yield
    finally:
        _library.strict_set_limit(0)


@contextmanager
def failing(after: int, times: int = 1) -> Iterator[None]:
    """`times` allocations run out of memory, when `after` others have not."""
    _library.strict_fail(after, times)
    try:
        yield
    finally:
        _library.strict_fail(0, 0)
