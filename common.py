"""What the programs share: errors, reading untrusted files, writing whole files, options, clocks.

Three rules of this repository are kept here, once:

    a user's mistake      raise UserError: `run_program` prints one line on stderr, exits with 2
    an untrusted file     read it inside `reading(path)`: any fault is a UserError with its name
    an output file        write it inside `replacing(path)`: a crash leaves the old file or the new
"""
import argparse
import contextlib
import json
import math
import os
import pickle
import stat
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def end_quietly(kind, error, traceback):
    """Python's excepthook while our programs import: Ctrl-C is one line there too."""
    if kind is KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if Path(sys.argv[0]).resolve().parent == HERE:      # a program that imports us keeps its own hook
    sys.excepthook = end_quietly

import torch                    # takes seconds, like all that builds on it: so the hook comes first
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_TEXT_FILE = 256 * 2**20     # bytes; the largest tokenizer.json in the wild has some 35 MiB


# ----------------------------------------------------------------------------------------- errors

class UserError(Exception):
    """Something the user can fix. The programs print it as one line and exit with status 2."""


def say(message, end="\n"):
    """Print a remark to stderr: stdout carries only results."""
    if sys.stderr is None:          # the shell closed it (2>&-); print would use stdout
        return
    try:
        print(printable(message), end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):   # a full disk behind it, or no reader: nowhere left to say so
        drop(sys.stderr)


def printable(text):
    r"""text with control characters and lone surrogates escaped (\x1b), but for line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def one_line(text, limit=1000):
    """text as a single line of at most `limit` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= limit else text[:limit] + "..."


def quoted(value, limit=80):
    """repr(value), cut to `limit` characters: values from files can be megabytes long."""
    return one_line(repr(value), limit)


def reason(error):
    """Why an exception was raised, in a few words: the system's own, or the first line of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, pickle.UnpicklingError):   # torch.load's advice is for programmers
        return "it is not a file of torch.save that holds only tensors"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(printable(lines[0]), 200)       # parsers quote what they read


def run_program(main, argv=None):
    """Run main(argv) and return the exit status: a mistake is one line on stderr and status 2."""
    name = Path(sys.argv[0]).name
    try:
        status = main(argv) or 0
        if sys.stdout is not None:
            sys.stdout.flush()      # a full disk behind stdout shows only now
        return status
    except UserError as e:
        message = str(e)
    except KeyboardInterrupt:
        say(f"{name}: interrupted")
        return 130
    except BrokenPipeError:         # `| head`: the reader has what it wanted
        drop_stdout()
        return 0
    except OSError as e:
        drop_stdout()
        message = f"{e.filename or 'the output'}: {reason(e)}"
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        message = f"out of memory, a smaller --chunk or --dtype may help: {reason(e)}"
    # An error may be one process's alone, so each of them says its own.
    if torchrun_processes() > 1 and os.environ["RANK"] != "0":
        name = f"rank {os.environ['RANK']}: {name}"
    say(f"{name}: {one_line(message)}")
    return 2


def is_out_of_memory(error):
    """Is this torch's or Python's way of saying so? On a CPU torch raises a plain RuntimeError."""
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return out_of_memory or "can't allocate memory" in str(error)


def drop_stdout():
    """Let later writes to stdout go nowhere: its reader has gone."""
    drop(sys.stdout)


def drop(stream):
    """Let later writes to a stream, also Python's own at exit, go nowhere."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---------------------------------------------------------------------------------- reading files

@contextlib.contextmanager
def reading(path, what="read"):
    """The boundary around untrusted files: any error inside becomes a UserError naming the file.

    Parsers raise almost anything (RecursionError for JSON nested 100,000 deep, MemoryError for a
    header that asks for 2^60 bytes), so this catches every Exception. A Rust library that panics
    raises a PanicException, which is none and has no module to import it from.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):     # a full GPU is not the file's fault
        raise
    except OSError as e:        # a missing file, for instance: its format has no part in it
        verb = "read" if what.startswith("read") else what
        raise UserError(f"{path} cannot be {verb}: {reason(e)}") from None
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise                   # Ctrl-C
        raise UserError(f"{path} cannot be {what}: {reason(e)}") from None


def check_regular(path, most=None):
    """UserError unless path is a regular file (or a link to one) of at most `most` bytes.

    A named pipe or a device in a model's folder would block or never end.
    """
    with reading(path):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file")
    if most is not None and status.st_size > most:
        raise UserError(f"{path} has {status.st_size:,} bytes; at most {most:,} are expected")


def read_text(path, most=MAX_TEXT_FILE):
    """The text of a regular UTF-8 file, without a byte-order mark."""
    check_regular(path, most)
    with reading(path):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path, required=True):
    """The object in a JSON file; {} if it is absent and not required."""
    if not os.path.lexists(path) and not required:
        return {}
    if not os.path.exists(path):
        raise UserError(f"{path} is missing")
    text = read_text(path)

    def refuse(constant):           # NaN and Infinity are no JSON, but Python reads them
        raise ValueError(f"{constant} is not a number")

    with reading(path, "read as JSON"):
        value = json.loads(text, parse_constant=refuse)
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, it holds a {type(value).__name__}")
    return value


def check_number(path, key, value, low, high=math.inf, whole=False):
    """value, if it is a (whole) number from low to high; else a UserError naming path and key.

    JSON's true and false are ints to Python; they are refused, and so are strings, NaN and 1e400,
    which Python reads as infinity.
    """
    kind = int if whole else (int, float)
    is_number = isinstance(value, kind) and not isinstance(value, bool) and value != math.inf
    if is_number and low <= value <= high:
        return value
    wanted = "a whole number" if whole else "a number"
    bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    raise UserError(f"{path}: {key} should be {wanted} {bounds}, it is {quoted(value)}")


# ---------------------------------------------------------------------------------- writing files

@contextlib.contextmanager
def replacing(path):
    """A temporary file to write to: renamed to `path` at the block's end, removed on failure.

    It lies in the same folder, since a file cannot be renamed to another disk. Its name is new, so
    that it is nobody else's file, and ends with .part: a killed process leaves it behind.
    A symbolic link stays one: the file that it points to is replaced.
    """
    check_replaceable(path)
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    part = None
    try:
        file, part = tempfile.mkstemp(prefix=f"{name}.", suffix=".part", dir=folder)
        os.close(file)
        yield part
        os.chmod(part, mode_of(target))     # mkstemp creates files as 0600
        os.replace(part, target)
    # safetensors has its own kind for a full disk. A model's folder may have a name that is no
    # UTF-8, and no file can hold that.
    except (OSError, SafetensorError, UnicodeError) as e:
        raise UserError(f"{path} cannot be written: {reason(e)}") from None
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)


def mode_of(path):
    """The permissions that a file has, or that a new one gets."""
    if os.path.exists(path):
        return stat.S_IMODE(os.stat(path).st_mode)
    umask = os.umask(0)             # it can only be read by setting it
    os.umask(umask)
    return 0o666 & ~umask


def write_text(path, text):
    """Write a whole text file, or leave what was there."""
    with replacing(path) as part:
        Path(part).write_text(text, encoding="utf-8")


def check_replaceable(path):
    """UserError if something else than a file is there: a rename would destroy a device."""
    if os.path.isdir(path):
        raise UserError(f"{path} cannot be written: it is a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} cannot be written: it is not a regular file")


def check_writable(path):
    """UserError now, rather than after the work, if a file cannot be written at path."""
    path = str(path)
    if not path or "\0" in path:
        raise UserError(f"{quoted(path)} is no name for a file")
    check_replaceable(path)
    folder = os.path.dirname(os.path.realpath(path))        # of a link: where it points to
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written: {folder} is no folder that can be written to")


def check_appendable(path):
    """The same for a file that lines are added to: if it is there, its folder does not matter."""
    if not os.path.isfile(path):
        check_writable(path)
    elif not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be written: it is read-only")


# ---------------------------------------------------------------------------------------- options

class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors: one line, like all others."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def whole(low, high=2**63 - 1):
    """The type of an option that takes a whole number from low to high."""
    return number_type(int, "a whole number", low, high)


def real(low, high=math.inf):
    """The type of an option that takes a number from low to high; NaN is none."""
    return number_type(float, "a number", low, high)


def number_type(kind, name, low, high):
    """A function from an option's text to a number of this kind (int or float), for argparse."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            bounds = f"from {low} to {high:,}"
            # A reader wants to see the largest number of all only if theirs is larger.
            if high in (math.inf, 2**63 - 1) and not value > high:
                bounds = f"of at least {low}"
            raise argparse.ArgumentTypeError(f"should be {name} {bounds}, it is {quoted(text)}")
        return value

    return parse


def model_options(parser):
    """Add the options that every program shares."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=str(HERE / "tiny"), metavar="FOLDER",
                       help="a folder in Hugging Face layout, or a hub name (default: the bundled "
                            "model)")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    group.add_argument("--dtype", choices=DTYPES,
                       help="of weights and cache (default: the model's own; float32 on a CPU)")
    group.add_argument("--seed", type=whole(0), default=0, help="of everything random (default: 0)")


def pick_device(name=None):
    """The device called `name`; by default a GPU if there is one, else the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {quoted(name)}: should be cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: this machine has no CUDA device that torch "
                            f"{torch.__version__} can use")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA "
                            "devices")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)       # Triton launches on the current device
    return device


# -------------------------------------------------------------------------------- time and memory

def progress(total, description, unit, delay=1.0):
    """A progress bar on a terminal for work of more than `delay` seconds; `.update(n)` moves it."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    # Whole counts (1,536 of 3,732 tokens), but a rounded rate (4.67k tokens/s).
    bar = "{l_bar}{bar}| {n:,}/{total:,}{unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return tqdm(total=total, desc=description, unit=f" {unit}", unit_scale=True, bar_format=bar,
                delay=delay, leave=False, disable=not on_terminal)


def clock(device):
    """Seconds now, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device):
    """The most memory held at once: the allocator's on CUDA, the process's on a CPU.

    None on Windows, where Python does not know.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(device):
    """Memory that is free on a device, or None where nobody says: on a CPU only Linux does."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    return None


# ------------------------------------------------------------------------------- several processes

def torchrun_processes():
    """How many processes torchrun started; 1 without it, also where a cluster sets WORLD_SIZE."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


@contextlib.contextmanager
def process_group(args):
    """Join the processes that torchrun started, if it did. Only the first one prints anything."""
    if torchrun_processes() == 1:
        yield
        return
    # Each process has its own GPU, also with a bare --device cuda.
    if args.device == "cuda" or args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(args.device)       # a wrong one is a line now, and a traceback in NCCL
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if dist.get_rank() > 0:
                stack.enter_context(contextlib.redirect_stdout(None))
                stack.enter_context(contextlib.redirect_stderr(None))
            yield
    finally:
        dist.destroy_process_group()


def rank_and_processes():
    """(this process's number, how many there are) of those that torchrun started; else (0, 1)."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def all_reduce_sum(x, processes):
    """The tensor x summed over processes, in place; x itself if there is only one."""
    if processes > 1:
        dist.all_reduce(x)
    return x
