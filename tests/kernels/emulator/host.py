"""What the host does before a kernel is launched: tensor maps, parameters, sizes.

Read from the last listing of Mosaic's passes, where the host's part is LLVM's dialect,
and run here: its numbers are integers, and its memory is values by the byte at which
they start.
"""

import re
from typing import Any, NamedTuple

from emulator.copies import BYTES, SPANS, TensorMap
from emulator.device import GLOBAL, Launch

LAST = "IR Dump Before ReconcileUnrealizedCasts"
FUNCTION = re.compile(
    r"llvm\.func @\w+_mosaic_gpu\((.*?)\) attributes[^\n]*\n(.*?)\n  \}", re.DOTALL
)
OPERATION = re.compile(r"(?:(%[\w$]+) = )?(?:llvm\.|builtin\.)?([\w.]+) ?(.*)")
ELEMENT = re.compile(r"\s*(?:inbounds\S* )?(%[\w$]+)\[([^\]]*)\].*?->.*?, (.*)$")
SAME = ("unrealized_conversion_cast", "ptrtoint", "inttoptr", "trunc")
SIZES = {"i8": 1, "bf16": 2, "f16": 2, "i32": 4, "f32": 4, "i64": 8, "!llvm.ptr": 8}
# Where the host's own memory begins, and how far its pieces are from each other.
HOST, PIECE = 1 << 60, 1 << 20


class Launched(NamedTuple):
    """How a kernel is launched, and with which parameters.

    A parameter is an address, or, of an array of tensor maps, each by its byte.
    """

    launch: Launch
    parameters: list[int | dict[int, TensorMap]]


class Host:
    """Runs the operations of one function."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.memory: dict[int, Any] = {}
        self.pieces = 0
        self.launched: Launched | None = None

    def run(self, line: str) -> None:
        found = OPERATION.fullmatch(line)
        if not found:
            raise NotImplementedError(line)
        to, name, rest = found.groups()
        names = re.findall(r"%[\w$]+", rest.split(" : ")[0])
        values: list[Any] = [self.values.get(name) for name in names]
        if name == "call":
            self.call(rest, values)
        elif name == "store":
            self.memory[values[1]] = values[0]
        elif name != "return":
            self.values[to] = self.value(name, rest, values)

    def value(self, name: str, rest: str, values: list[Any]) -> Any:
        """Returns the result of an operation."""
        if name in SAME:
            return values[0]
        match name:
            case "mlir.constant":
                return int(re.findall(r"^\((-?\d+)", rest)[0])
            case "mlir.undef" | "mlir.poison":
                return {}
            case "mlir.addressof":
                return None
            case "add":
                return values[0] + values[1]
            case "mul":
                return values[0] * values[1]
            case "alloca":
                self.pieces += 1
                return HOST + PIECE * self.pieces
            case "getelementptr":
                return self.element(rest)
            case "load":
                return self.loaded(values[0], rest)
            case "insertvalue":
                return values[1] | {self.place(rest): values[0]}
            case "extractvalue":
                return values[0][self.place(rest)]
        raise NotImplementedError(f"{name} {rest}")

    @staticmethod
    def place(rest: str) -> str:
        return re.findall(r"\[([\d, ]+)\]", rest)[0]

    def element(self, rest: str) -> int:
        found = ELEMENT.match(rest)
        if not found:
            raise NotImplementedError(rest)
        base, index, of = self.values[found[1]], found[2].split(","), found[3]
        numbers = [self.values[p.strip()] if "%" in p else int(p) for p in index]
        if len(numbers) == 2:  # a field of a struct, all of them of 8 bytes
            return base + 8 * numbers[1]
        return base + SIZES[of] * numbers[0]

    def loaded(self, at: int, rest: str) -> Any:
        return self.piece(at) if "array<" in rest.split("->")[-1] else self.memory[at]

    def piece(self, at: int) -> dict[int, Any]:
        """Returns what is in memory from there on, to the end of the piece."""
        piece = range(at, at + PIECE)
        return {k - at: value for k, value in self.memory.items() if k in piece}

    def call(self, rest: str, values: list[Any]) -> None:
        if "@mosaic_gpu_init_tma_desc" in rest:
            self.map(*values)
        elif "@mosaic_gpu_launch_kernel" in rest:  # JAX 0.10
            self.launch(values[1:10], values[10], values[12])
        elif "@mosaic_gpu_build_kernel_spec" in rest:
            self.launch(values[1:10], values[10], values[13])
        else:
            raise NotImplementedError(rest)

    def map(
        self,
        to: int,
        address: int,
        dtype: int,
        rank: int,
        sizes: int,
        strides: int,
        swizzle: int,
        box: int,
    ) -> None:
        """Makes a tensor map, whose fastest axis comes first."""
        itemsize = BYTES[dtype]

        def numbers(at: int) -> list[int]:
            return [self.memory[at + 8 * k] for k in reversed(range(rank))]

        made = TensorMap(
            address,
            itemsize,
            tuple(numbers(sizes)),
            tuple(itemsize * stride for stride in numbers(strides)),
            tuple(numbers(box)),
            SPANS[swizzle],
        )
        made.check()
        self.memory[to] = made

    def launch(self, sizes: list[Any], shared: int, pointers: int) -> None:
        """Notes a launch, given as counts along x, y and z: see `Launch`."""
        grid, cluster, threads = sizes[:3], sizes[3:6], sizes[6:]
        # No clusters are clusters of one.
        cluster = [max(side, 1) for side in cluster]
        parameters = []
        while pointers + 8 * len(parameters) in self.memory:
            to = self.memory[pointers + 8 * len(parameters)]
            value = self.memory[to]
            # Tensor maps are handed over as they lie (JAX 0.12), or in a copy.
            parameters.append(self.piece(to) if isinstance(value, TensorMap) else value)
        self.launched = Launched(
            Launch(tuple(grid), tuple(cluster), tuple(threads), shared), parameters
        )


def launched(listing: str) -> Launched:
    """Runs the host's part, for arguments at `(k + 1) << GLOBAL`.

    Raises:
      ValueError: If it launches nothing.
    """
    found = FUNCTION.search(listing, listing.rindex(LAST))
    if not found:
        raise ValueError("the listing has no function that launches a kernel")
    signature, body = found.groups()
    host = Host()
    # The last argument points to pointers to the arrays.
    last = re.findall(r"(%[\w$]+): !llvm\.ptr", signature)[-1]
    host.values[last] = HOST
    host.memory = {HOST + 8 * k: (k + 1) << GLOBAL for k in range(64)}
    for line in body.splitlines():
        host.run(re.sub(r" loc\(.*$", "", line).strip())
    if host.launched is None:
        raise ValueError("nothing is launched")
    return host.launched
