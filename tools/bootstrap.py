#!/usr/bin/env python3
"""Make .venv ready: find a Python, check the disk, install the package with exact versions. Safe to run again, to interrupt, and to run
twice at once. Standard library only, and readable by an old Python, so that it can say that Python is too old."""
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST, NEWEST = (3, 10), (3, 12)
NEED_GB = 3.0   # PyTorch for the CPU with everything else; its CUDA build takes about 8
EXTRAS = ("dev", "demo")
HALF = ".protoquant-half"   # in .venv while files are put in place: what is left behind by an interruption then cannot be trusted


class SetupError(Exception):
    "What is missing, in one line."


def python_ok(version):
    "Is this (major, minor, ...) one that the project runs on?"
    return OLDEST <= tuple(version[:2]) <= NEWEST


def python_version(exe):
    "(major, minor) of an interpreter that can make environments; None where it does not run."
    code = "import sys, venv, ensurepip; print('%d %d' % sys.version_info[:2])"
    try:
        r = subprocess.run([exe, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=60)
        return tuple(map(int, r.stdout.split())) if r.returncode == 0 else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def find_python(current=None, version_of=python_version):
    "An interpreter that will do: the running one, else python3.12, 3.11, 3.10; raises SetupError naming what is missing."
    current = current or sys.executable
    have = version_of(current)
    if have and python_ok(have):
        return current
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        exe = "python3.%d" % minor
        found = version_of(exe)
        if found and python_ok(found):
            return exe
    here = "%d.%d is here" % tuple(have[:2]) if have else "the one here cannot make environments (is the package python3-venv missing?)"
    raise SetupError("Python 3.10, 3.11 or 3.12 with the module venv is needed and %s; install one and run again "
                     "(make PYTHON=/path/to/python3.12 uses a certain one)." % here)


def need_space(root, need_gb=NEED_GB, free_of=None):
    "Raise SetupError where the disk has less room than the installation needs."
    free = (free_of or (lambda p: shutil.disk_usage(p).free))(root) / 1e9
    if free < need_gb:
        raise SetupError("%.1f GB of disk space are needed and %.1f GB are free in %s; make room and run again." % (need_gb, free, root))


def fingerprint(root, version):
    "Changes when the installation has to be brought up to date."
    h = hashlib.sha256(repr((os.path.abspath(root), tuple(version))).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(root, name), "rb") as f:
            h.update(f.read())
    return h.hexdigest()


def read_stamp(venv):
    "Content of the stamp; {} where there is none or it is damaged."
    try:
        with open(os.path.join(venv, ".protoquant-stamp")) as f:
            s = json.load(f)
        return s if isinstance(s, dict) else {}
    except (OSError, ValueError):
        return {}


def write_stamp(venv, stamp):
    "Written last, in one step: a stamp means a complete installation."
    path = os.path.join(venv, ".protoquant-stamp")
    with open(path + ".tmp", "w") as f:
        json.dump(stamp, f)
    os.replace(path + ".tmp", path)


def up_to_date(venv, mark, extras):
    "Does the stamp cover these extras of this very project?"
    s = read_stamp(venv)
    return s.get("hash") == mark and set(extras) <= set(s.get("extras", []))


@contextlib.contextmanager
def lock(root):
    "One set-up at a time for one folder; a second waits. The lock goes with its process, however that ends."
    try:
        import fcntl
    except ImportError:   # not a POSIX system
        yield
        return
    name = "protoquant-%d-%s.lock" % (os.getuid(), hashlib.sha256(os.path.abspath(root).encode()).hexdigest()[:16])
    with open(os.path.join(tempfile.gettempdir(), name), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("set-up: another set-up of this folder is at work, waiting for it", flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def why(log, status):
    "The cause of a failed pip, in one line."
    lines = [l.strip() for l in log.splitlines()]
    if any("No space left" in l or "Errno 28" in l for l in lines):
        return "the disk is full (PyTorch's CUDA build takes about 8 GB with its libraries); make room and run again"
    errors = [l for l in lines if l.startswith("ERROR:")]
    return errors[0][6:].strip() if errors else "pip ended with status %s" % status


def show(line):
    "The lines of pip's output that tell a person how far it is: large files, and the last step."
    return "Downloading" in line and (" MB)" in line or " GB)" in line) or line.startswith("Installing collected")


def pip_install(python, root, extras, log_path):
    "Run pip, showing how far it is; raises SetupError with the cause in one line."
    pins = os.path.join(root, "constraints.txt")
    env = dict(os.environ, PIP_CONSTRAINT=pins, PIP_BUILD_CONSTRAINT=pins, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    cmd = [python, "-m", "pip", "install", "--progress-bar", "off", "-c", pins, "-e", "%s[%s]" % (root, ",".join(extras))]
    began, marker = time.time(), os.path.join(root, ".venv", HALF)
    with open(log_path, "w") as log, subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                                      env=env, cwd=root, universal_newlines=True, errors="replace") as p:
        try:
            for line in p.stdout:
                log.write(line)
                if line.startswith("Installing collected"):
                    open(marker, "w").close()
                if show(line):
                    print("set-up: %4.0f s  %s" % (time.time() - began, line.strip()[:100]), flush=True)
        except BaseException:
            p.terminate()
            raise
    if not p.returncode and os.path.exists(marker):
        os.unlink(marker)
    if p.returncode:
        with open(log_path) as f:
            raise SetupError("installing failed: %s (all of it: %s)" % (why(f.read(), p.returncode), os.path.relpath(log_path)))


def make_venv(python, venv):
    "Make the environment, or keep the one there is; a broken one (an interrupted set-up) is made anew. Returns its interpreter."
    inner = os.path.join(venv, "Scripts" if os.name == "nt" else "bin", "python")
    have = python_version(inner) if os.path.exists(inner) else None
    if have and not python_ok(have):
        raise SetupError("%s was made with Python %d.%d; delete it and run again." % ((venv,) + have))
    whole = have and subprocess.run([inner, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    if not whole or os.path.exists(os.path.join(venv, HALF)):
        if os.path.isdir(venv):
            shutil.rmtree(venv)
        r = subprocess.run([python, "-m", "venv", venv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        if r.returncode:
            raise SetupError("no environment could be made in %s: %s" % (venv, " ".join(r.stdout.split())[-200:]))
    return inner


def setup(root=ROOT, extras=EXTRAS, need_gb=None):
    "Bring root/.venv up to date; returns True where something had to be done."
    venv, began = os.path.join(root, ".venv"), time.time()
    need_gb = float(os.environ.get("PROTOQUANT_NEED_GB", NEED_GB)) if need_gb is None else need_gb
    with lock(root):
        inner = os.path.join(venv, "Scripts" if os.name == "nt" else "bin", "python")
        if os.path.exists(inner) and up_to_date(venv, fingerprint(root, OLDEST), extras):
            return False
        python = find_python()
        extras = sorted(set(extras) | set(read_stamp(venv).get("extras", [])))
        if not has_torch(venv):
            need_space(root, need_gb)
        print("set-up: installing into .venv (some minutes the first time)", flush=True)
        inner = make_venv(python, venv)
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(venv, ".protoquant-stamp"))
        pip_install(inner, root, extras, os.path.join(venv, "protoquant-pip.log"))
        write_stamp(venv, dict(hash=fingerprint(root, OLDEST), extras=extras))
        print("set-up: ready in %.0f s" % (time.time() - began), flush=True)
    return True


def has_torch(venv):
    "Is PyTorch, by far the largest part, already there?"
    lib = os.path.join(venv, "lib")
    for d in os.listdir(lib) if os.path.isdir(lib) else []:
        if os.path.isdir(os.path.join(lib, d, "site-packages", "torch", "lib")):
            return True
    return False


def main(argv):
    "Exit status: 0 ready, 1 something is missing (said in one line), 130 interrupted."
    try:
        setup(extras=tuple(argv) or EXTRAS)
        return 0
    except SetupError as e:
        print("set-up: %s" % e, file=sys.stderr)
        return 1
    except OSError as e:
        print("set-up: %s%s" % ("the disk is full: " if e.errno == 28 else "", e), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up: interrupted; run it again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
