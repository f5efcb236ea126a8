"""Commands for shell blocks that do not load torch each time: a warm process forks one child for each command.

    python warm.py serve SOCKET               # import everything once, then fork for whoever connects
    python warm.py run SOCKET ARGS...         # run `ctc-drafter ARGS...` there, with this process's files and folder
    python warm.py python SOCKET FILE ARGS... # run `python FILE ARGS...` there

What runs in the child is the real `main` of the command line, or the file.
"""

import json
import os
import runpy
import signal
import socket
import sys


def run(path: str, words: list[str]) -> int:
    """The client, for `run` or `python` and what follows: hand the work over, pass signals on, return the exit code."""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        request = json.dumps({"words": words, "folder": os.getcwd(), "environment": dict(os.environ)})
        socket.send_fds(link, [len(request).to_bytes(4, "big")], [0, 1, 2])
        link.sendall(request.encode("ascii"))
        answers = link.makefile()
        child = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: os.kill(child, received))
        return int(answers.readline())


def serve(path: str) -> None:
    import torch  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import ctc_drafter.bench.command
    import ctc_drafter.inspection
    import ctc_drafter.serving.app
    import ctc_drafter.training.distill
    import ctc_drafter.training.trainer  # noqa: F401

    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children that answer
        while True:
            link, _ = door.accept()
            if os.fork() == 0:
                door.close()
                answer(link)
            link.close()


def answer(link: socket.socket) -> None:
    """In a child of the server: fork once more for the work, and tell the client how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(link, 4, 3)
    reader = link.makefile("rb")
    request = json.loads(reader.read(int.from_bytes(head, "big")))
    child = os.fork()
    if child == 0:
        for standard, file in enumerate(files):
            os.dup2(file, standard)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        work(*request["words"])
    link.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    link.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def work(kind: str, *words: str) -> None:
    from ctc_drafter.cli import main

    sys.argv = list(words) if kind == "python" else ["ctc-drafter", *words]
    code: object = 1
    try:
        if kind == "python":
            sys.path[0] = os.getcwd()
            runpy.run_path(words[0], run_name="__main__")
        else:
            main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    kind, path, *words = sys.argv[1:]
    if kind == "serve":
        serve(path)
    sys.exit(run(path, [kind, *words]))
