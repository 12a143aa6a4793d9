"""An Apache of one's own, on a free port of this machine, with the example's own configuration files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import family, has_ended
from pool_support import PATIENCE, eventually
from serving import EXAMPLE, ROOT, answers, free_port

MODULES = Path("/usr/lib/apache2/modules")
USER = "www-data"

CONFIGURATION = """
ServerRoot "{folder}"
ServerName localhost
DefaultRuntimeDir run
PidFile run/apache.pid
Mutex file:run default
ErrorLog error.log
Listen 127.0.0.1:{port}
{user}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule env_module {modules}/mod_env.so
LoadModule wsgi_module {modules}/mod_wsgi.so
WSGISocketPrefix run/wsgi
MaxKeepAliveRequests 0
KeepAliveTimeout 30

Define MEMBERS_CODE {folder}/code
Define MEMBERS_PACKAGES {folder}/packages
Define MEMBERS_DATABASE {database}
Define MEMBERS_URL {url}
Define MEMBERS_GROUP {group}
Include "{folder}/code/{mode}.conf"
{second}
"""


def find_apache() -> str:
    """Return the path of the server's program.

    Raises:
        FileNotFoundError: it is not installed, or not mod_wsgi; the message says how to get it.
    """
    program = shutil.which("apache2", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None or not (MODULES / "mod_wsgi.so").exists():
        raise FileNotFoundError("no Apache with mod_wsgi here: apt-get install apache2 libapache2-mod-wsgi-py3")
    return program


class Apache:
    """A server with the example in it. Runs during a `with` block.

    Args:
        mode: whose configuration file: "daemon" or "embedded".
        groups: the application groups: one, or two.

    Attributes:
        prefixes: below which paths the application is, one for each group.
        folder: all that it has. Not in pytest's folder, which Apache's user may not enter, nor in a `TMPDIR` like that.
    """

    def __init__(self, mode: str, groups: tuple[str, ...]) -> None:
        self._program = find_apache()
        self.folder = Path(tempfile.mkdtemp(prefix="sqlitepool-apache-", dir="/tmp"))
        self.database = self.folder / "data" / "members.db"
        self.port = free_port()
        for name in ("data", "run"):
            (self.folder / name).mkdir()
        without_bytecode = shutil.ignore_patterns("__pycache__")
        shutil.copytree(EXAMPLE, self.folder / "code", ignore=without_bytecode)
        shutil.copytree(ROOT / "sqlitepool", self.folder / "packages" / "sqlitepool", ignore=without_bytecode)
        user = ""
        if os.geteuid() == 0:  # Apache does not serve as root
            user = f"User {USER}\nGroup {USER}"
            shutil.chown(self.folder / "data", USER, USER)
        self.prefixes, second = [""], ""
        if len(groups) == 2:
            self.prefixes = ["/1", "/2"]
            process_group = "members" if mode == "daemon" else "%{GLOBAL}"
            second = (
                f"WSGIScriptAlias /2 {self.folder}/code/app.wsgi"
                f" process-group={process_group} application-group={groups[1]}"
            )
        subprocess.run(["chmod", "-R", "a+rX", self.folder], check=True)  # whatever our umask is, and the checkout's
        self._configuration = self.folder / "apache.conf"
        self._configuration.write_text(
            CONFIGURATION.format(
                folder=self.folder,
                port=self.port,
                user=user,
                modules=MODULES,
                database=self.database,
                url=self.prefixes[0] or "/",
                group=groups[0],
                second=second,
                mode=mode,
            )
        )

    def __enter__(self) -> Apache:
        try:
            self._control("start")
            self._wait_until_it_answers()
            return self
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.stop()
        finally:
            if kind is not None:
                print(self.log)
            shutil.rmtree(self.folder)

    def _control(self, verb: str) -> None:
        command = [self._program, "-f", str(self._configuration), "-k", verb]
        # Its Python is another one, and is to find our package where the configuration says.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert ended.returncode == 0, ended.stderr + self.log

    def _wait_until_it_answers(self) -> None:
        eventually(lambda: all(answers(self.port, prefix) for prefix in self.prefixes))

    @property
    def pid(self) -> int:
        """The process that all others descend from."""
        return int((self.folder / "run" / "apache.pid").read_text())

    @property
    def log(self) -> str:
        path = self.folder / "error.log"
        return path.read_text() if path.exists() else ""

    def restart_gracefully(self) -> None:
        """Have all processes replaced when they have answered what they were asked; return when they are."""
        old = set(family(self.pid)) - {self.pid}
        self._control("graceful")
        eventually(lambda: all(map(has_ended, old)))
        self._wait_until_it_answers()

    def stop(self) -> None:
        """Stop, and return when the last process has ended. May be called again."""
        if not (self.folder / "run" / "apache.pid").exists():
            return
        pid = self.pid
        members = family(pid)
        self._control("stop")
        eventually(lambda: all(map(has_ended, members)))
