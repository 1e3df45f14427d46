"""Small programs for CPUs: written in Python, compiled by LLVM when first used, called by XLA.

For what XLA does poorly there. A program is a number of tasks that do not depend on one another,
which the threads of XLA share: so its results do not depend on how many these are. XLA calls it
through its foreign function interface (xla/ffi/api/c_api.h, which comes with jaxlib).

`Code` writes a function down, as LLVM's own IRBuilder does, in fewer words: `Value` has Python's
operators, `loop` is a `with`, and what is computed with Python's numbers is a constant in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER, VOID = ir.PointerType(), ir.VoidType()
Number: TypeAlias = "Value | int | float"


def _plain(pointer: Any, pointee: Any = None) -> Any:
    """The pointer, of the only type that LLVM's language has left; of functions llvmlite asks more."""
    pointer.type = ir.PointerType()
    pointer.type.pointee = pointee
    return pointer


def function(module: Any, name: str, operands: list[Any], result: Any) -> Any:
    """A function of the module, or of the C library or LLVM where nothing is written for it."""
    kind = ir.FunctionType(result, operands)
    return module.globals.get(name) or _plain(ir.Function(module, kind, name), kind)


class Machine(NamedTuple):
    """What the processor's registers hold.

    Attributes:
        lanes: float32 numbers of one.
        accumulators: registers that a product may sum in, of those that there are.
    """

    lanes: int
    accumulators: int


@functools.cache
def machine() -> Machine:
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return Machine(lanes=16, accumulators=16)  # of 32
    if features.get("avx"):
        return Machine(lanes=8, accumulators=8)  # of 16
    return Machine(lanes=4, accumulators=16)  # of 32 on ARM


class Value:
    """A number, a vector of numbers or a pointer of the program that is written."""

    def __init__(self, builder: Any, of: Any) -> None:
        self.builder, self.of = builder, of

    @property
    def real(self) -> bool:
        kind = self.of.type
        return (kind.element if isinstance(kind, ir.VectorType) else kind) == F32

    def like(self, other: Number) -> Any:
        """`other` as an operand beside this."""
        if isinstance(other, Value):
            return other.of
        kind = self.of.type
        if self.real:
            other = float(np.float32(other))
        if isinstance(kind, ir.VectorType):
            return ir.Constant(kind, [other] * kind.count)
        return ir.Constant(kind, other)

    def _do(self, real: str, whole: str, other: Number) -> Value:
        name = real if self.real else whole
        return Value(self.builder, getattr(self.builder, name)(self.of, self.like(other)))

    def __add__(self, other: Number) -> Value:
        return self._do("fadd", "add", other)

    def __sub__(self, other: Number) -> Value:
        return self._do("fsub", "sub", other)

    def __mul__(self, other: Number) -> Value:
        return self._do("fmul", "mul", other)

    def __truediv__(self, other: Number) -> Value:
        return self._do("fdiv", "", other)

    def __floordiv__(self, other: Number) -> Value:
        return self._do("", "sdiv", other)

    def __mod__(self, other: Number) -> Value:
        return self._do("", "srem", other)

    def __and__(self, other: Number) -> Value:
        return self._do("", "and_", other)

    def __or__(self, other: Number) -> Value:
        return self._do("", "or_", other)

    def _compare(self, sign: str, other: Number) -> Value:
        b = self.builder
        compare = b.fcmp_ordered if self.real else b.icmp_signed
        return Value(b, compare(sign, self.of, self.like(other)))

    def __lt__(self, other: Number) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Number) -> Value:
        return self._compare("<=", other)

    def same(self, other: Number) -> Value:
        return self._compare("==", other)


def _with_lanes(kind: Any, x: Value) -> Any:
    of = x.of.type
    return ir.VectorType(kind, of.count) if isinstance(of, ir.VectorType) else kind


class Variable:
    """A place for a value that changes."""

    def __init__(self, code: Code, initial: Value) -> None:
        with code.builder.goto_entry_block():
            self._at = _plain(code.builder.alloca(initial.of.type))
        self._code, self._type = code, initial.of.type
        self.set(initial)

    def get(self) -> Value:
        return Value(self._code.builder, self._code.builder.load(self._at, typ=self._type))

    def set(self, value: Value) -> None:
        self._code.builder.store(value.of, self._at)


class Code:
    """Writes one function.

    Args:
        module: of LLVM, that the function is added to.
        name: of the function.
        operands: the types of its operands.
        result: the type of what it returns.
    """

    def __init__(self, module: Any, name: str, operands: list[Any], result: Any = VOID) -> None:
        self.module = module
        self.function = function(module, name, operands, result)
        self.function.attributes.add("nounwind")
        self.function.attributes.add("noinline")
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.operands = [Value(self.builder, arg) for arg in self.function.args]

    def number(self, number: int, kind: Any = I64) -> Value:
        return Value(self.builder, ir.Constant(kind, number))

    def real(self, number: float, lanes: int | None = None) -> Value:
        """A float32, or a vector of it."""
        rounded = float(np.float32(number))
        of = F32 if lanes is None else ir.VectorType(F32, lanes)
        return Value(self.builder, ir.Constant(of, rounded if lanes is None else [rounded] * lanes))

    def yes(self, so: bool) -> Value:
        return Value(self.builder, ir.Constant(I1, int(so)))

    def count(self, lanes: int) -> Value:
        """0, 1, 2 ..., int32."""
        of = ir.VectorType(I32, lanes)
        return Value(self.builder, ir.Constant(of, list(range(lanes))))

    def variable(self, initial: Value) -> Variable:
        return Variable(self, initial)

    @contextlib.contextmanager
    def loop(self, start: Number, stop: Number, step: int = 1) -> Iterator[Value]:
        """for i in range(start, stop, step), of 64 bits."""
        b = self.builder
        zero = self.number(0)
        first, last = zero.like(start), zero.like(stop)
        head, body, end = (b.append_basic_block(name) for name in ("head", "body", "end"))
        before = b.block
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(first, before)
        b.cbranch(b.icmp_signed("<", i, last), body, end)
        b.position_at_end(body)
        yield Value(b, i)
        i.add_incoming(b.add(i, ir.Constant(I64, step)), b.block)
        b.branch(head)
        b.position_at_end(end)

    @contextlib.contextmanager
    def until(self, condition: Callable[[], Value]) -> Iterator[None]:
        """while not condition()."""
        b = self.builder
        head, body, end = (b.append_basic_block(name) for name in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        b.cbranch(condition().of, end, body)
        b.position_at_end(body)
        yield
        b.branch(head)
        b.position_at_end(end)

    @contextlib.contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.of):
            yield

    @contextlib.contextmanager
    def either(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """Yields two contexts: what to do if so, and what otherwise."""
        with self.builder.if_else(condition.of) as both:
            yield both

    def at(self, pointer: Value, offset: Number, kind: Any = F32) -> Value:
        """The pointer, so many numbers of `kind` further."""
        where = self.number(0).like(offset)
        return Value(self.builder, self.builder.gep(pointer.of, [where], source_etype=kind))

    def load(
        self, pointer: Value, offset: Number = 0, lanes: int | None = None, kind: Any = F32
    ) -> Value:
        """The number at the offset, or a vector of so many."""
        of = kind if lanes is None else ir.VectorType(kind, lanes)
        at = self.at(pointer, offset, kind)
        align = 8 if kind in (I64, POINTER) else 4 if kind not in (I8, F16) else 1
        return Value(self.builder, self.builder.load(at.of, align=align, typ=of))

    def prefetch(self, pointer: Value, ahead: int) -> None:
        """Asks for what lies so many bytes further, which need not be the program's.

        It comes into the second cache, so that the first keeps what is read again and again.
        """
        at, how = self.at(pointer, ahead, I8), [self.number(i, I32) for i in (0, 2, 1)]
        self.intrinsic("llvm.prefetch.p0", VOID, at, *how)  # to read, for that cache, data

    def store(self, value: Value, pointer: Value, offset: Number = 0) -> None:
        of = value.of.type
        kind = of.element if isinstance(of, ir.VectorType) else of
        at = self.at(pointer, offset, kind)
        self.builder.store(value.of, at.of, align=8 if kind in (I64, POINTER) else 4)

    def narrow(self, x: Value) -> Value:
        """An int64 as an int32."""
        return Value(self.builder, self.builder.trunc(x.of, I32))

    def widen(self, x: Value) -> Value:
        """An int32 as an int64."""
        return Value(self.builder, self.builder.sext(x.of, I64))

    def nearest(self, x: Value) -> tuple[Value, Value]:
        """The whole number n that is nearest to x, from -127 to 127, and 2**n; of -127 that is 0."""
        b, begin = self.builder, 1.5 * 2**23  # from here to 2**24 float32 numbers are whole
        moved = x + begin
        bits = Value(b, b.bitcast(moved.of, _with_lanes(I32, x)))
        # The last bits are n, which become the exponent; all others are shifted out.
        exponent = Value(b, b.shl(bits.of, bits.like(23))) + (127 << 23)
        return moved - begin, Value(b, b.bitcast(exponent.of, x.of.type))

    def transpose(self, rows: list[Value]) -> list[Value]:
        """As many vectors as each has lanes, turned."""
        count, distance = len(rows), 1
        rows = list(rows)
        while distance < count:
            upper = [j if not j & distance else count + j - distance for j in range(count)]
            lower = [j + distance if not j & distance else count + j for j in range(count)]
            for i in range(count):
                if not i & distance:
                    pair = rows[i], rows[i + distance]
                    rows[i], rows[i + distance] = (self.pick(*pair, to) for to in (upper, lower))
            distance *= 2
        return rows

    def splat(self, value: Value, lanes: int) -> Value:
        of = ir.VectorType(value.of.type, lanes)
        one = self.builder.insert_element(
            ir.Constant(of, ir.Undefined), value.of, ir.Constant(I32, 0)
        )
        vector = Value(self.builder, one)
        return self.pick(vector, vector, [0] * lanes)

    def pick(self, a: Value, b: Value, lanes: list[int]) -> Value:
        """Some of the lanes of two vectors, counted on from a to b."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
        return Value(self.builder, self.builder.shuffle_vector(a.of, b.of, mask))

    def call(self, function: Any, *operands: Value) -> Value:
        return Value(self.builder, self.builder.call(function, [x.of for x in operands]))

    def intrinsic(self, name: str, result: Any, *operands: Value) -> Value:
        """LLVM's own function `name`, declared here if it is not yet."""
        return self.call(
            function(self.module, name, [x.of.type for x in operands], result), *operands
        )

    def lane_by_lane(self, name: str, first: Value, *others: Value) -> Value:
        """LLVM's own function of float32 numbers, or of vectors of them."""
        kind = first.of.type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.intrinsic(f"llvm.{name}.{suffix}", kind, first, *others)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, rounded once where the processor can."""
        return self.lane_by_lane("fmuladd", a, b, c)

    def largest(self, a: Value, b: Value) -> Value:
        return self.lane_by_lane("maxnum", a, b)

    def given(self, pointer: Value) -> Value:
        """Whether it is not null."""
        null = ir.Constant(POINTER, None)
        return Value(self.builder, self.builder.icmp_unsigned("!=", pointer.of, null))

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        return Value(self.builder, self.builder.select(condition.of, a.of, b.of))

    def least(self, a: Value, b: Number) -> Value:
        """The smaller of two whole numbers."""
        return self.select(a < b, a, Value(self.builder, a.like(b)))

    def first(self, vector: Value) -> Value:
        b = self.builder
        return Value(b, b.extract_element(vector.of, ir.Constant(I32, 0)))

    def across(self, combine: Callable[[Value, Value], Value], vector: Value) -> Value:
        """All lanes combined, halves with halves: always in the same order."""
        count = vector.of.type.count
        while count > 1:
            count //= 2
            halves = (list(range(at, at + count)) for at in (0, count))
            vector = combine(*(self.pick(vector, vector, half) for half in halves))
        return self.first(vector)

    def end(self, value: Value | None = None) -> Any:
        """Returns from the function, which is given back."""
        if value is None:
            self.builder.ret_void()
        else:
            self.builder.ret(value.of)
        return self.function


class Operand(NamedTuple):
    """An array that XLA gives a program, or takes from it."""

    data: Value
    rank: Value
    dims: Value

    def dim(self, code: Code, from_last: int) -> Value:
        """The size of the dim that is so many before the last."""
        return code.load(self.dims, self.rank - (1 + from_last), kind=I64)

    def before(self, code: Code, count: int) -> Value:
        """The product of all dims but the last `count`, as of rows."""
        product = code.variable(code.number(1))
        with code.loop(0, self.rank - count) as i:
            product.set(product.get() * code.load(self.dims, i, kind=I64))
        return product.get()


# Of XLA's interface, bytes from the beginning of a struct. Of a call: what is asked besides, the
# functions that XLA offers, its context, the operands and the results.
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS = 8, 16, 24, 72, 112
_METADATA = 24  # of the extension
_VERSION, _TRAITS = 24, 32  # of the metadata
_ERROR, _SCHEDULE, _THREADS = 48, 136, 144  # of the functions
_DATA, _RANK, _DIMS = 24, 32, 40  # of a buffer

# What threads share of a call, in words of 64 bits; operands follow, three words each, and then the next
# task of each range.
_HOLDERS, _BEGUN, _DONE, _TASKS, _RANGES, _SCRATCH, _OPERANDS = range(7)
_CACHE_LINE = 64
_RESOURCE_EXHAUSTED = 8  # of XLA's errors


class Program(NamedTuple):
    """What `register` compiles.

    Attributes:
        operands: how many arrays XLA gives and takes.
        tasks: writes how many tasks there are.
        scratch: writes how many bytes of memory a thread needs for its tasks.
        task: writes what a task does, of its number and that memory.
    """

    operands: tuple[int, int]
    tasks: Callable[[Code, list[Operand]], Value]
    scratch: Callable[[Code, list[Operand]], Value]
    task: Callable[[Code, list[Operand], Value, Value], None]


def no_memory(code: Code, operands: list[Operand]) -> Value:
    """`Program.scratch` of one whose tasks need none."""
    return code.number(0)


_engines: dict[str, Any] = {}  # machine code lives as long as its engine
_lock = threading.Lock()


def register(name: str, write: Callable[[Any], Program]) -> str:
    """Compiles a program for this processor, unless it is; returns the name that XLA knows it by.

    Args:
        name: tells all that the program depends on, but the machine.
        write: is given the module of LLVM that the program's own functions are to be in.
    """
    name = "_".join(("gptjax", name, *map(str, machine())))
    with _lock:
        if name not in _engines:
            module = ir.Module(name)
            _handler(module, write(module))
            _engines[name] = engine = _compile(module)
            address = ctypes.c_void_p(engine.get_function_address("handler"))
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform="cpu")
    return name


def _compile(module: Any) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    if machine().lanes == 16:
        features += ",-prefer-256-bit"  # else LLVM halves the vectors of some processors
    # More of LLVM's effort takes half as long again for the same speed: vectors are written down here.
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=1
    )
    parsed = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(1))
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, target)
    engine.finalize_object()
    return engine


def _handler(module: Any, program: Program) -> None:
    """What XLA calls, and what each of its threads does of it."""
    libc = {
        name: function(module, name, operands, result)
        for name, operands, result in [
            ("malloc", [I64], POINTER),
            ("free", [POINTER], VOID),
            ("sched_yield", [], I32),
        ]
    }
    count = sum(program.operands)
    nexts = _OPERANDS + 3 * count

    def operands(code: Code, job: Value) -> list[Operand]:
        words = [code.load(job, _OPERANDS + i, kind=I64) for i in range(3 * count)]
        pointer = lambda word: Value(code.builder, code.builder.inttoptr(word.of, POINTER))  # noqa: E731
        return [
            Operand(pointer(data), rank, pointer(dims))
            for data, rank, dims in zip(words[::3], words[1::3], words[2::3], strict=True)
        ]

    task = Code(module, "task", [POINTER, I64, POINTER])
    job, number, scratch = task.operands
    program.task(task, operands(task, job), number, scratch)
    do_task = task.end()

    def add(code: Code, job: Value, word: int, change: int) -> Value:
        """Changes what is shared; returns what it was."""
        at, by = code.at(job, word, I64), ir.Constant(I64, change)
        return Value(code.builder, code.builder.atomic_rmw("add", at.of, by, "acq_rel"))

    def done(code: Code, job: Value) -> Value:
        at = code.at(job, _DONE, I64)
        return Value(code.builder, code.builder.load_atomic(at.of, "acquire", 8, typ=I64))

    # The last one to leave frees what is shared, as XLA may start a thread long after all is done.
    code = Code(module, "leave", [POINTER])
    (job,) = code.operands
    with code.when(add(code, job, _HOLDERS, -1).same(1)):
        code.call(libc["free"], job)
    leave = code.end()

    # A thread begins with a range of tasks of its own, in their order, so that what a task asks of memory
    # ahead of itself is for the same processor. Whoever has done these helps with the next range.
    work = Code(module, "work", [POINTER, POINTER])
    job, memory = work.operands
    tasks, ranges = (work.load(job, word, kind=I64) for word in (_TASKS, _RANGES))
    own = add(work, job, _BEGUN, 1)
    with work.when(work.given(memory)):
        address = Value(work.builder, work.builder.ptrtoint(memory.of, I64))
        scratch = work.at(memory, work.number(_CACHE_LINE) - address % _CACHE_LINE, I8)
        with work.loop(own, own + ranges) as turn:
            i = turn % ranges
            stop, next_ = tasks * (i + 1) // ranges, work.at(job, i + nexts, I64)
            taken = work.variable(add(work, next_, 0, 1))
            with work.until(lambda: stop <= taken.get()):
                work.call(do_task, job, taken.get(), scratch)
                add(work, job, _DONE, 1)
                taken.set(add(work, next_, 0, 1))
        work.call(libc["free"], memory)
    do_work = work.end()

    def allocate(code: Code, job: Value) -> Value:
        """What a thread needs for its tasks; null where there is no more memory."""
        return code.call(libc["malloc"], code.load(job, _SCRATCH, kind=I64) + _CACHE_LINE)

    code = Code(module, "help", [POINTER])
    (job,) = code.operands
    with code.when(done(code, job) < code.load(job, _TASKS, kind=I64)):
        code.call(do_work, job, allocate(code, job))
    code.call(leave, job)
    help_ = code.end()

    handler = Code(module, "handler", [POINTER], POINTER)
    (frame,) = handler.operands
    b = handler.builder
    ask = Value(b, _plain(b.alloca(ir.ArrayType(I64, 5))))
    pool = Value(b, _plain(b.alloca(I64)))
    null = Value(b, ir.Constant(POINTER, None))
    text = bytearray(b"no memory for a program of gptjax.native\0")
    message = ir.GlobalVariable(module, ir.ArrayType(I8, len(text)), "message")
    message.initializer = ir.Constant(message.value_type, text)

    def of(struct: Value, byte: int, kind: Any = POINTER) -> Value:
        at = b.gep(struct.of, [ir.Constant(I64, byte)], source_etype=I8)
        return Value(b, b.load(at, align=8, typ=kind))

    extension = of(frame, _EXTENSION)
    with handler.when(handler.given(extension)):
        # The version that this is written for, 0.1; no traits.
        about = of(extension, _METADATA)
        at = handler.at(about, _VERSION // 4, I32)
        handler.store(handler.number(0, I32), at, 0)
        handler.store(handler.number(1, I32), at, 1)
        handler.store(handler.number(0, I32), at, (_TRAITS - _VERSION) // 4)
        b.ret(null.of)
    api, context = of(frame, _API), of(frame, _CONTEXT)

    def offered(byte: int, *words: Value) -> Any:
        """Calls one of XLA's functions of a struct: its size, nothing more, the words."""
        for i, word in enumerate((handler.number(8 * (2 + len(words))), handler.number(0), *words)):
            handler.store(word, ask, i)
        return b.call(_plain(of(api, byte).of, ir.FunctionType(POINTER, [POINTER])), [ask.of])

    handler.store(handler.number(1), pool)
    offered(_THREADS, context, pool)
    threads = handler.load(pool, kind=I64)
    job = handler.call(libc["malloc"], (threads + nexts) * 8)
    lists = zip((_ARGUMENTS, _RESULTS), program.operands, strict=True)
    buffers = [of(of(frame, byte), 8 * i) for byte, count in lists for i in range(count)]
    for place, buffer in enumerate(buffers):
        for word, byte in enumerate((_DATA, _RANK, _DIMS)):
            handler.store(of(buffer, byte, I64), job, _OPERANDS + 3 * place + word)
    arrays = operands(handler, job)
    tasks = program.tasks(handler, arrays)
    handler.store(tasks, job, _TASKS)
    handler.store(program.scratch(handler, arrays), job, _SCRATCH)
    memory = allocate(handler, job)  # its own, so that all is done whoever helps
    with handler.when(handler.given(memory).same(0)):
        handler.call(libc["free"], job)
        b.ret(offered(_ERROR, Value(b, _plain(message)), handler.number(_RESOURCE_EXHAUSTED)))
    for word in (_BEGUN, _DONE):
        handler.store(handler.number(0), job, word)

    threads = handler.least(threads, tasks)
    threads = handler.select(threads < 1, handler.number(1), threads)  # there may be no task
    handler.store(threads, job, _RANGES)
    with handler.loop(0, threads) as i:
        handler.store(tasks * i // threads, job, i + nexts)
    handler.store(threads, job, _HOLDERS)
    with handler.loop(1, threads):
        offered(_SCHEDULE, context, Value(b, help_), job)
    handler.call(do_work, job, memory)
    with handler.until(lambda: tasks <= done(handler, job)):
        b.call(libc["sched_yield"], [])
    handler.call(leave, job)
    handler.end(null)
