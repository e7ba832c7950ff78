"""Every private name of Numba that the library uses, and what is done without it.

A feature that lacks one of its names, or fails its own test, is lost: there is one warning, and a
slower road is taken. Kernels on disk are kept apart by what their process had lost.

What ``numba.extending`` hands to an intrinsic (``context``, ``builder``) is Numba's interface for
extensions, and LLVM's instructions are llvmlite's: those are used elsewhere in this room, too.
"""

import ctypes
import importlib
import operator
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types

# By feature: what is worse without it.
WITHOUT = {
    "launch": "a call on several threads takes longer to begin",
    "compiler": "kernels take longer to compile",
    "disk": "every process compiles its kernels anew",
    "count": "a call on several threads takes longer to begin",
    "python": "code that the user compiles cannot call numbanorm.jit",
    "lock": "a child that is forked while another thread compiles may wait for ever",
    "_nrt": "kernels count references, and rows that are short take twice as long",
    "forceinline": "kernels take longer",
    "no_cfunc_wrapper": "kernels take longer to compile",
    "no_cpython_wrapper": "kernels take longer to compile",
}

# By feature: where its names are.
NAMES = {
    "launch": [
        "numba.core.base:BaseContext.get_arg_packer",
        "numba.core.callconv:CPUCallConv.call_function",
        "numba.core.callconv:CPUCallConv.get_function_type",
        "numba.core.callconv:CPUCallConv.return_native_none",
        "numba.core.callconv:CPUCallConv.return_status_propagate",
        "numba.core.codegen:JITCodeLibrary.get_pointer_to_function",
    ],
    "compiler": [
        "llvmlite.binding:create_pass_builder",
        "llvmlite.binding:create_pipeline_tuning_options",
        "numba.core.codegen:JITCodeLibrary._finalize_final_module",
        "numba.core.codegen:JITCodeLibrary._optimize_final_module",
        "numba.core.codegen:JITCodeLibrary._optimize_functions",
        "numba.core.codegen:JITCodeLibrary.add_ir_module",
        "numba.core.compiler:Compiler.define_pipelines",
        "numba.core.compiler_machinery:PassManager.add_pass",
        "numba.core.compiler_machinery:PassManager.finalize",
    ],
    "disk": [
        "numba.core.codegen:CodeLibrary.has_dynamic_globals",
        "numba.core.codegen:JITCPUCodegen.magic_tuple",
        "numba.core.compiler:CompileResult._rebuild",
        "numba.core.compiler:CompileResult._reduce",
        "numba.core.serialize:dumps",
    ],
    # Numba defines them when its threads start.
    "count": [
        "numba.np.ufunc.parallel:_get_num_threads",
        "numba.np.ufunc.parallel:_set_num_threads",
    ],
    "python": [
        "numba.core.callconv:CPUCallConv.return_exc",
        "numba.core.cpu:CPUContext.get_env_manager",
    ],
    "lock": ["numba.core.compiler_lock:global_compiler_lock.acquire"],
    "_nrt": ["numba.core.cpu:CPUTargetOptions._nrt"],
    "forceinline": ["numba.core.cpu:CPUTargetOptions.forceinline"],
    "no_cfunc_wrapper": ["numba.core.cpu:CPUTargetOptions.no_cfunc_wrapper"],
    "no_cpython_wrapper": ["numba.core.cpu:CPUTargetOptions.no_cpython_wrapper"],
}

_lost: set[str] = set()


def lost() -> list[str]:
    """Return the features that there are not."""
    return sorted(_lost)


def has(feature: str) -> bool:
    """Tell whether there is a feature."""
    return feature not in _lost


def lose(feature: str, problem: object) -> None:
    """Go on without a feature, and say so once."""
    if feature not in _lost:
        _lost.add(feature)
        warnings.warn(
            f"numbanorm goes on without a part of Numba {numba.__version__} that it knows "
            f"otherwise ({problem}): {WITHOUT[feature]}",
            RuntimeWarning,
            stacklevel=2,
        )


def _find(name: str) -> Any:
    module, _, attributes = name.partition(":")
    return operator.attrgetter(attributes)(importlib.import_module(module))


def _names(feature: str) -> list[Any]:
    """Return the objects that a feature's names stand for; it is lost where one is missing."""
    objects = []
    for name in NAMES[feature]:
        try:
            objects.append(_find(name))
        except (ImportError, AttributeError):
            lose(feature, f"{name.replace(':', '.')} is missing")
            return []
    return objects


for _feature in NAMES:
    if _feature != "count":
        _names(_feature)


_self_tests: dict[str, Callable[[], bool]] = {}


def self_test(feature: str) -> Callable[[Callable[[], bool]], Callable[[], bool]]:
    """Have a function tell whether a feature works, before the first kernel is compiled.

    What is on disk was compiled by a process in which it did.
    """

    def register(test: Callable[[], bool]) -> Callable[[], bool]:
        _self_tests[feature] = test
        return test

    return register


def run_self_tests() -> None:
    """Test every feature, the first time."""
    while _self_tests:
        feature, test = _self_tests.popitem()
        if not has(feature):
            continue
        try:
            works, problem = test(), f"the self-test of {feature}"
        except Exception as error:
            works, problem = False, f"the self-test of {feature}: {error!r}"
        if not works:
            lose(feature, problem)


# -- Flags ---------------------------------------------------------------------------------------


def known(**flags: Any) -> dict[str, Any]:
    """Return those flags of ``numba.njit`` that this Numba knows."""
    return {name: value for name, value in flags.items() if has(name)}


# -- Helpers of LLVM -----------------------------------------------------------------------------


def pack(builder: Any, values: Any, aggregate: Any = None) -> Any:
    """Return an array of values, or another aggregate."""
    packed = ir.Constant(aggregate or ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for k, value in enumerate(values):
        packed = builder.insert_value(packed, value, k)
    return packed


def unpack(builder: Any, aggregate: Any, n: int) -> list[Any]:
    """Return the values of an aggregate."""
    return [builder.extract_value(aggregate, k) for k in range(n)]


def on_stack(builder: Any, value: Any) -> Any:
    """Return where a value is in memory. Loops do not take more of the stack each time."""
    with builder.goto_entry_block():
        place = builder.alloca(value.type)
    builder.store(value, place)
    return place


def declare(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Return a function that is defined elsewhere."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, args), name)


def align_stack(function: Any) -> None:
    """Have what a function keeps of vectors on its stack begin where vectors do.

    LLVM sees too late that registers do not suffice. Of what is in two pages, a core cannot load
    what it has just stored before all earlier stores are done: a kernel takes up to ten times as
    long, by where the stack of its process happens to lie.
    """
    function.attributes.alignstack = 64
    function.attributes.add("nounwind")  # llvmlite writes down none without another one


# -- Launch --------------------------------------------------------------------------------------

THREE = (types.intp,) * 3


def call_address(
    context: Any, builder: Any, address: Any, args: Any, propagate: bool = True
) -> None:
    """Call a compiled function of three integers; its exception may become that of the caller."""
    function_type = context.call_conv.get_function_type(types.none, THREE)
    function = builder.inttoptr(address, function_type.as_pointer())
    status, _ = context.call_conv.call_function(builder, function, types.none, THREE, args)
    if propagate:
        with builder.if_then(status.is_error, likely=False):
            context.call_conv.return_status_propagate(builder, status)


class Share:
    """What calls the kernel that is being built for a share of its tasks, from any thread.

    A function of three integers: which share, of how many, and the address of the arguments. An
    exception cannot leave a thread of Numba's: the first is kept beside the arguments.
    """

    def __init__(self, context: Any, builder: Any) -> None:
        self._builder = builder
        kernel, argument_types = builder.function, context.fndesc.argtypes
        packer = context.get_arg_packer(argument_types)
        # Before its own arguments a compiled function has two, for its result and its exception.
        args = packer.from_arguments(builder, kernel.args[2:])
        status, exception = ir.IntType(32), kernel.args[1].type.pointee
        layout = ir.LiteralStructType([*(arg.type for arg in args), status, exception])
        self._n = len(args)
        given = [*args, ir.Constant(status, 0), ir.Constant(exception, None)]
        self._place = on_stack(builder, pack(builder, given, layout))
        function_type = context.call_conv.get_function_type(types.none, THREE)
        function = ir.Function(builder.module, function_type, f"{kernel.name}.share")
        function.linkage = "internal"
        function.attributes.add("noinline")  # the kernel would be there twice

        inner = ir.IRBuilder(function.append_basic_block())
        _, _, i, n, address = function.args
        place = inner.inttoptr(address, layout.as_pointer())
        values = unpack(inner, inner.load(place), self._n)
        values[0] = pack(inner, [ir.Constant(i.type, 0), i, n])
        result, _ = context.call_conv.call_function(
            inner, kernel, types.none, argument_types, values
        )
        with inner.if_then(result.is_error, likely=False):
            nothing = ir.Constant(status, 0)
            old = inner.cmpxchg(
                self._field(inner, place, 0), nothing, result.code, "monotonic", "monotonic"
            )
            with inner.if_then(inner.extract_value(old, 1)):
                inner.store(result.excinfoptr, self._field(inner, place, 1))
        context.call_conv.return_native_none(inner)
        integer = i.type
        self.function = builder.ptrtoint(function, integer)
        self.args = builder.ptrtoint(self._place, integer)

    def _field(self, builder: Any, place: Any, k: int) -> Any:
        word = ir.IntType(32)
        return builder.gep(place, [word(0), word(self._n + k)])

    def raise_first(self) -> None:
        """Leave the kernel with the first exception of a share, if there is one."""
        builder = self._builder
        status = builder.load(self._field(builder, self._place, 0))
        failed = builder.icmp_signed("!=", status, ir.Constant(status.type, 0))
        with builder.if_then(failed, likely=False):
            exception = builder.load(self._field(builder, self._place, 1))
            builder.store(exception, builder.function.args[1])
            builder.ret(status)


def address_of_compiled(kernel: Any, signature: Any) -> int:
    """Return where the machine code of a compiled function begins."""
    kernel.compile(signature)
    compiled = kernel.overloads[signature]
    address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    if not address:
        raise RuntimeError("there is no machine code")
    return int(address)


# -- Compiler ------------------------------------------------------------------------------------

# Passes over Numba's intermediate code that change nothing in kernels: these have no closures, no
# array expressions, no with and no exceptions made at run time, and nobody reads annotations. After
# each of them Numba would look anew which variables are alive.
_IDLE_PASSES = {
    "AnnotateTypes", "DumpParforDiagnostics", "FindLiterallyCalls", "InlineClosureLikes",
    "InlineInlinables", "InlineOverloads", "LiteralPropagationSubPipelinePass", "LiteralUnroll",
    "MakeFunctionToJitFunction", "NoPythonSupportedFeatureValidation", "NopythonRewrites",
    "RewriteDynamicRaises", "WithLifting",
}  # fmt: skip


def _compiler(inlined: bool) -> type:
    """Return the compiler of kernels, or that of what is linked into them."""
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import Compiler
    from numba.core.compiler_machinery import PassManager

    class KernelLibrary(JITCodeLibrary):
        """The code of a kernel, which is optimised once, with all that is inlined into it.

        Numba would optimise it by itself before. Loops are not unrolled: theirs are vectors.
        """

        def _optimize_functions(self, module: Any) -> None:
            if not has("compiler"):
                super()._optimize_functions(module)

        def _optimize_final_module(self) -> None:
            if not has("compiler"):
                super()._optimize_final_module()
                return
            config = numba.config
            tuning = binding.create_pipeline_tuning_options(speed_level=config.OPT)
            tuning.loop_vectorization = bool(config.LOOP_VECTORIZE)
            tuning.slp_vectorization = bool(config.SLP_VECTORIZE)
            tuning.loop_unrolling = False
            builder = binding.create_pass_builder(self._codegen._tm, tuning)
            builder.getModulePassManager().run(self._final_module, builder)

    class InlinedLibrary(JITCodeLibrary):
        """The code of a function that is only linked into others, and is compiled with them.

        Numba would optimise it by itself, and make machine code of it that nobody calls.
        """

        def _optimize_functions(self, module: Any) -> None:
            if not has("compiler"):
                super()._optimize_functions(module)

        def add_ir_module(self, ir_module: Any) -> None:
            for function in ir_module.functions:
                if not function.is_declaration:
                    align_stack(function)
            super().add_ir_module(ir_module)

        def _optimize_final_module(self) -> None:
            if not has("compiler"):
                super()._optimize_final_module()

        def _finalize_final_module(self) -> None:
            self._finalized = True

        @property
        def codegen(self) -> Any:
            """What keeps the environments of functions that Python calls: this is none."""
            return self

        def set_env(self, name: str, environment: Any) -> None:
            """Do nothing."""

    kind = InlinedLibrary if inlined else KernelLibrary

    class ShortCompiler(Compiler):
        """Numba's compiler without passes that do nothing here."""

        def __init__(self, typing: Any, target: Any, library: Any, *rest: Any) -> None:
            if library is None and has("compiler"):
                library = kind(target.codegen(), "numbanorm")
                library.enable_object_caching()
            super().__init__(typing, target, library, *rest)

        def define_pipelines(self) -> list[Any]:
            pipelines: list[Any] = super().define_pipelines()
            if not has("compiler") or self.state.flags.auto_parallel.enabled:
                return pipelines
            return [self._shortened(pipeline) for pipeline in pipelines]

        def _shortened(self, pipeline: Any) -> Any:
            shorter = PassManager(pipeline.pipeline_name)
            for compiler_pass, description in pipeline.passes:
                if compiler_pass.__name__ not in _IDLE_PASSES:
                    shorter.add_pass(compiler_pass, description)
            shorter.finalize()
            return shorter

    return ShortCompiler


def compiler(inlined: bool = False) -> dict[str, Any]:
    """Return flags of ``numba.njit`` for kernels, or for what only they call."""
    flags = known(no_cpython_wrapper=True) if inlined else {}
    if has("compiler"):
        flags["pipeline_class"] = _compiler(inlined)
    return flags


# -- Python --------------------------------------------------------------------------------------


def call_python(
    context: Any, builder: Any, called: Any, kinds: Any, values: Any, returned_type: Any
) -> Any:
    """Call a Python object with whether the caller has the GIL, and with values of some types.

    Return what it returns as a value of a type; what it raises is raised. Numba keeps the object
    with the code that it compiles, also on disk.
    """
    has_gil = builder.call(declare(builder, "PyGILState_Check", ir.IntType(32)), ())
    python, environment = context.get_python_api(builder), context.get_env_manager(builder)
    gil = python.gil_ensure()
    objects = [python.long_from_signed_int(has_gil)]
    for kind, value in zip(kinds, values, strict=True):
        context.nrt.incref(builder, kind, value)  # it becomes the object's
        objects.append(python.from_native_value(kind, value, environment))
    function = environment.read_const(environment.add_const(called))
    returned = python.call_function_objargs(function, objects)
    for item in objects:
        python.decref(item)
    has_raised = builder.icmp_unsigned("==", returned, returned.type(None))
    with builder.if_then(has_raised, likely=False):
        python.gil_release(gil)
        context.call_conv.return_exc(builder)
    native = python.to_native_value(returned_type, returned)
    if native.cleanup is not None:
        native.cleanup()
    python.decref(returned)
    python.gil_release(gil)
    with builder.if_then(native.is_error, likely=False):
        context.call_conv.return_exc(builder)
    return native.value


# -- On disk -------------------------------------------------------------------------------------


def machine(context: Any) -> Any:
    """Return what says for which processor code is compiled."""
    return context.codegen().magic_tuple()


def pack_compiled(compiled: Any) -> bytes | None:
    """Return a compiled function as bytes, or None if addresses of this process are part of it."""
    from numba.core.serialize import dumps

    return None if compiled.library.has_dynamic_globals else dumps(compiled._reduce())


def unpack_compiled(context: Any, content: bytes) -> Any:
    """Return a compiled function from bytes."""
    from numba.core.compiler import CompileResult

    context.refresh()
    return CompileResult._rebuild(context, *pickle.loads(content))


# -- Threads and locks ---------------------------------------------------------------------------


class ThreadCount:
    """How many threads the next parallel call of this Python thread runs on; Numba's have started.

    Numba's own functions start them, if need be, under a lock that a Ctrl-C would leave behind.
    """

    def __init__(self) -> None:
        self.get, self.set = numba.get_num_threads, numba.set_num_threads
        names = _names("count")
        if names:
            get, set_ = names
            try:
                before = get()
                set_(before)
                same = before == numba.get_num_threads()
            except TypeError:
                same = False
            if same:
                self.get, self.set = get, set_
            else:
                lose("count", f"{NAMES['count'][0].replace(':', '.')} says something else")


def compiler_lock() -> Any:
    """Return what a thread has that compiles, or None."""
    return _find("numba.core.compiler_lock:global_compiler_lock") if has("lock") else None


def keep_tbb() -> None:
    """Have Numba's module for tbb stay when Python ends, which would wait for ever at times.

    Numba starts tbb's threads by a task that does nothing, and waits for that task when the module
    goes. Where tbb has one CPU there is no thread to take it but the one that started them: it has
    gone if it was a ``threading.Thread``, and its tasks have if there was a fork. The end of the
    process ends tbb's threads in any case.
    """
    module = sys.modules.get("numba.np.ufunc.tbbpool")
    if module is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))
