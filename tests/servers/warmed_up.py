"""The example, opened as soon as it is loaded: with `--preload` this is before the server forks."""

from wsgiref.types import WSGIEnvironment
from wsgiref.util import setup_testing_defaults

from members import application

environ: WSGIEnvironment = {}
setup_testing_defaults(environ)
application(environ, lambda *_: lambda _: None)
