"""Typed configuration to ganesha's own language."""

import os
from pathlib import Path

import jinja2

from ganesha.config import ServerConfig, check, client_list, encoded, filesystem_id
from ganesha.errors import ConfigError

_SQUASH = {"none": "No_Root_Squash", "root": "Root_Squash", "all": "All_Squash"}


def quote(value: str | Path) -> str:
    """`value` as one string of ganesha's configuration language.

    Its lexer knows '...' without escapes and "..." in which a backslash escapes; but there the longest match wins, so
    a double quote that follows a backslash never ends the string, whatever stands before it, and values keep their
    escapes unresolved. Hence plain quotes of the kind that the value lacks, and no escapes at all.
    Raises ConfigError for a value that has both kinds of quote, a NUL, or cannot be said in either.
    """
    text = os.fspath(value) if isinstance(value, Path) else value
    if b"\0" in encoded(text):
        raise ConfigError(f"a NUL cannot be part of a configuration value: {text!r}")
    if "'" not in text:
        return f"'{text}'"
    if '"' not in text and "\\" not in text:
        return f'"{text}"'
    raise ConfigError(f"cannot be written in ganesha's configuration, which has no way to quote it: {text!r}")


_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("ganesha"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)
_environment.filters["quote"] = quote
_environment.filters["client_list"] = client_list


def render(config: ServerConfig, run_dir: Path) -> str:
    """The text of ganesha.conf. Raises ConfigError for what ganesha could not use or what cannot be quoted."""
    check(config)
    if not run_dir.is_absolute():
        raise ConfigError(f"the run directory must be absolute: {run_dir}")
    return _environment.get_template("ganesha.conf.j2").render(
        config=config,
        squash=_SQUASH,
        filesystem_id=filesystem_id,
    )
