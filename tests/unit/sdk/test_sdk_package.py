"""What the package exports and what the wheel holds."""

import dataclasses
import importlib
import inspect
import subprocess
import sys
import typing
import zipfile
from pathlib import Path

import pytest

import lemix
from lemix import aio, types
from lemix.errors import METADATA_KEY, ErrorCode, LemixError
from lemix.v1 import errors_pb2

_ROOT = Path(__file__).resolve().parents[3]
_PUBLIC = {"lemix", "lemix.aio", "lemix.client", "lemix.errors", "lemix.testing", "lemix.types"}


@pytest.mark.parametrize("name", sorted(_PUBLIC))
def test_exports_are_explicit_sorted_and_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__, key=lambda export: (not export.isupper(), export))
    assert all(hasattr(module, export) for export in module.__all__)


def test_the_exports_of_the_package() -> None:
    assert set(lemix.__all__) == {"Client", "ErrorCode", "LemixError", *types.__all__}


def test_no_protobuf_in_public_signatures() -> None:
    for client in (lemix.Client, aio.Client):
        for name, method in inspect.getmembers(client, inspect.isfunction):
            if not name.startswith("_"):
                assert "_pb2" not in str(inspect.signature(method)), name
                assert "_pb2" not in str(typing.get_type_hints(method)), name


def test_both_clients_offer_the_same() -> None:
    def public(cls: type) -> dict[str, list[str]]:
        members = inspect.getmembers(cls, inspect.isfunction)
        return {n: list(inspect.signature(m).parameters) for n, m in members if not n.startswith("_")}

    assert public(lemix.Client) == public(aio.Client)


def test_types_are_frozen() -> None:
    for name in types.__all__:
        cls = getattr(types, name)
        if dataclasses.is_dataclass(cls):
            assert cls.__dataclass_params__.frozen, name  # type: ignore[attr-defined]


def test_importing_the_package_needs_only_grpc_and_protobuf() -> None:
    code = (
        "import sys, lemix, lemix.aio, lemix.testing; "
        "print([m for m in ('typer', 'rich', 'torch', 'pydantic', 'structlog', 'services') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_ROOT / "sdk", timeout=60
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("code", list(ErrorCode))
def test_errors_survive_the_wire(code: ErrorCode) -> None:
    error = LemixError(code, "why", param="p", retry_after_s=1.5)
    again = LemixError.from_proto(errors_pb2.ErrorDetail.FromString(error.to_proto().SerializeToString()))
    assert (again.code, again.message, again.param, again.retry_after_s) == (code, "why", "p", 1.5)
    assert error.status is not None
    assert METADATA_KEY.endswith("-bin")


def test_the_error_codes_are_those_of_the_contract() -> None:
    names = {name.removeprefix("ERROR_CODE_") for name in errors_pb2.ErrorCode.keys()}  # noqa: SIM118
    assert {code.name for code in ErrorCode} == names - {"UNSPECIFIED"}


def test_an_unknown_code_counts_as_internal() -> None:
    assert LemixError.from_proto(errors_pb2.ErrorDetail(message="x")).code is ErrorCode.INTERNAL


def test_the_wheel_holds_the_public_package_alone(tmp_path: Path) -> None:
    pytest.importorskip("build")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(_ROOT)],
        check=True,
        capture_output=True,
        timeout=100,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith("METADATA")]
    assert {name.split("/")[0] for name in names} == {"lemix", f"lemix-{_version(metadata)}.dist-info"}
    assert not [name for name in names if name.startswith("lemix/internal")]
    assert {"lemix/client.py", "lemix/py.typed", "lemix/v1/types_pb2.py", "lemix/cli/app.py"} <= set(names)
    assert "lemix = lemix.cli:main" in entry_points


def _version(metadata: str) -> str:
    return next(line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Version: "))
