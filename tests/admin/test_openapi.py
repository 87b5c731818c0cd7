"""The API's description and the API say the same."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from nbdimg.admin.app import ADMIN_ROUTES
from nbdimg.admin.openapi import document
from nbdimg.configfile.mapping import ACCESS_KEYS, EXPORT_KEYS
from nbdimg.server.states import BitmapState, ClientState, ExportState, SnapshotState

ROUTES = {(route.method, route.path.replace(":[^/]+}", "}")) for route in ADMIN_ROUTES}


def operations(described: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (method.upper(), path)
        for path, item in described["paths"].items()
        for method in item
        if method not in ("parameters",)
    }


def problems(described: dict[str, Any]) -> list[str]:
    return [error.message for error in OpenAPIV31SpecValidator(described).iter_errors()]


def test_document_is_valid_openapi() -> None:
    assert problems(document()) == []


def test_document_has_every_route_and_no_other() -> None:
    assert operations(document()) == ROUTES


def test_document_names_each_operation_once_and_says_what_it_does() -> None:
    found = [item[method] for item in document()["paths"].values() for method in item if method != "parameters"]
    assert len({each["operationId"] for each in found}) == len(found)
    assert all(each["summary"].endswith((".", "?")) for each in found)


@pytest.mark.parametrize(
    ("schema", "keys"),
    [
        ("Export", {each.name for each in fields(ExportState)}),
        ("Client", {each.name for each in fields(ClientState)}),
        ("Snapshot", {each.name for each in fields(SnapshotState)}),
        ("Bitmap", {each.name for each in fields(BitmapState)}),
        ("NewExport", set(EXPORT_KEYS)),
    ],
)
def test_document_describes_every_field(schema: str, keys: set[str]) -> None:
    assert set(document()["components"]["schemas"][schema]["properties"]) == keys


def test_document_describes_every_key_of_an_access_rule() -> None:
    new = document()["components"]["schemas"]["NewExport"]
    assert set(new["properties"]["access"]["items"]["properties"]) == set(ACCESS_KEYS)


def test_control_a_route_without_description_and_a_wrong_document_are_noticed() -> None:
    described = copy.deepcopy(document())
    del described["paths"]["/v1/reload"]
    assert operations(described) != ROUTES
    described["paths"]["/v1/exports/{name}"]["parameters"] = []
    assert problems(described) != []
