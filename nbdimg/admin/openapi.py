"""The API's description as OpenAPI 3.1: written by hand from small parts; a test holds it and the routes together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from aiohttp import web

from nbdimg.admin.exports import BITMAP_ACTIONS_MAX, REMOVE_MODES
from nbdimg.admin.overview import DISCONNECT_MODES
from nbdimg.admin.problems import PROBLEM_TYPE
from nbdimg.admin.requests import JSON_TYPE
from nbdimg.config import OVERLAY_MODES
from nbdimg.formats import DRIVERS
from nbdimg.formats.qcow2.bitmap_edit import BitmapVerb

Json = dict[str, Any]

_STRING: Json = {"type": "string"}
_STRINGS: Json = {"type": "array", "items": _STRING}
_NULLABLE_STRING: Json = {"type": ["string", "null"]}
_COUNT: Json = {"type": "integer", "minimum": 0}
_SECONDS: Json = {"type": "number", "minimum": 0, "description": "seconds"}
_BOOLEAN: Json = {"type": "boolean"}
_SIZE: Json = {
    "oneOf": [{"type": "integer", "minimum": 1}, _STRING],
    "description": 'bytes, or a string as "10GiB"',
}


async def show_document(_: web.Request) -> web.Response:
    return web.json_response(document())


def document() -> Json:
    """The whole description."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nbdimg",
            "version": "1",
            "description": "Look at and change a running NBD server. Without a token at the Unix socket; over TCP each "
            "request brings one. Every refusal is a problem of RFC 9457 with one sentence.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"token": []}],
        "paths": {
            **_health_paths(),
            **_server_paths(),
            **_client_paths(),
            **_export_paths(),
            **_snapshot_paths(),
            **_bitmap_paths(),
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(),
            "parameters": {
                "name": _parameter("path", "name", _STRING, "the export's name, percent-encoded"),
                "snapshot": _parameter("path", "snapshot", _STRING, "the snapshot's name or id, percent-encoded"),
            },
            "responses": {"problem": _content(PROBLEM_TYPE, _reference("Problem"), "why not, in one sentence")},
        },
    }


def _health_paths() -> Json:
    text = _content("text/plain", _STRING, "a word, or a line for each export")
    verbose = _parameter("query", "verbose", _STRING, "whether each export gets a line")
    return {
        "/livez": {"get": _operation("livez", "Does the process answer? Touches no storage.", {"200": text})},
        "/readyz": {
            "get": _operation(
                "readyz",
                "May clients come? Not while starting or stopping, nor while an export has failed or is missing.",
                {"200": text, "503": text},
                parameters=[verbose],
            )
        },
        "/startupz": {"get": _operation("startupz", "Is everything open?", {"200": text, "503": text})},
        "/metrics": {"get": _operation("metrics", "Metrics, in Prometheus's text format.", {"200": text})},
    }


def _server_paths() -> Json:
    return {
        "/v1/openapi.json": {
            "get": _operation("openapi", "This document.", {"200": _json({"type": "object"}, "OpenAPI 3.1")})
        },
        "/v1/status": {
            "get": _operation("status", "The server as a whole, in every state.", {"200": _json(_reference("Status"))})
        },
        "/v1/stats": {
            "get": _operation(
                "stats", "Counters of each export; two answers make rates.", {"200": _json(_reference("Stats"))}
            )
        },
        "/v1/reload": {
            "post": _operation(
                "reload",
                "Read the configuration file again and apply it. A file that is refused changes nothing.",
                {"204": {"description": "applied"}},
                body={"type": "object"},
                is_body_needed=False,
            )
        },
    }


def _client_paths() -> Json:
    export = _parameter("query", "export", _STRING, "only clients of this export")
    client_id = _parameter("path", "id", _COUNT, "from the list of clients")
    mode = _mode("drain: requests in flight are answered; hard: cut at once", DISCONNECT_MODES)
    return {
        "/v1/clients": {
            "get": _operation(
                "clients",
                "Who is connected, the longest connected first.",
                {"200": _json(_list_of("clients", "Client"))},
                parameters=[export],
            )
        },
        "/v1/clients/{id}": {
            "delete": _operation(
                "disconnect",
                "Make one client go. It may connect again.",
                {"204": {"description": "gone"}},
                parameters=[client_id, mode],
            )
        },
    }


def _export_paths() -> Json:
    name = {"$ref": "#/components/parameters/name"}
    modes = (
        "drain: requests in flight are answered; hide: who is connected goes on, nobody else comes; "
        "hard: connections are cut. All return when that is done, hide at once."
    )
    size = {
        **_SIZE,
        "description": 'bytes, or a string as "10GiB"; as "+1GiB" or "-1GiB", more or fewer than there are',
    }
    resize = _object({"size": size}, {"shrink": {**_BOOLEAN, "default": False}})
    return {
        "/v1/exports": {
            "get": _operation(
                "exports", "All exports, hidden ones last.", {"200": _json(_list_of("exports", "Export"))}
            ),
            "post": _operation(
                "add",
                "Open an image and export it, with its snapshots.",
                {"201": _json(_list_of("exports", "Export"), "what is exported now", has_location=True)},
                body=_reference("NewExport"),
            ),
        },
        "/v1/exports/{name}": {
            "parameters": [name],
            "get": _operation("export", "One export.", {"200": _json(_reference("Export"))}),
            "delete": _operation(
                "remove",
                "Export an image no longer.",
                {"204": {"description": "removed"}},
                parameters=[_mode(modes, REMOVE_MODES)],
            ),
        },
        "/v1/exports/{name}/resize": {
            "parameters": [name],
            "post": _operation(
                "resize", "Give a disk another size, durably.", {"200": _json(_reference("Export"))}, body=resize
            ),
        },
    }


def _snapshot_paths() -> Json:
    name = {"$ref": "#/components/parameters/name"}
    return {
        "/v1/exports/{name}/snapshots": {
            "parameters": [name],
            "get": _operation(
                "snapshots", "An image's snapshots, oldest first.", {"200": _json(_list_of("snapshots", "Snapshot"))}
            ),
            "post": _operation(
                "create_snapshot",
                "Keep the disk as it is now, durably, and export that too.",
                {"201": _json(_reference("Snapshot"), "the new snapshot", has_location=True)},
                body=_object({"name": _STRING}),
            ),
        },
        "/v1/exports/{name}/snapshots/{snapshot}": {
            "parameters": [name, {"$ref": "#/components/parameters/snapshot"}],
            "delete": _operation("delete_snapshot", "Forget a snapshot.", {"204": {"description": "deleted"}}),
        },
    }


def _bitmap_paths() -> Json:
    action = _object(
        {"action": {"enum": list(get_args(BitmapVerb))}, "name": {**_STRING, "description": "the bitmap's"}},
        {
            "granularity": {**_SIZE, "description": "of add: a power of two from 512 to 2G"},
            "disabled": {**_BOOLEAN, "default": False, "description": "of add: it does not follow changes yet"},
            "sources": {**_STRINGS, "description": "of merge, which needs them: bitmaps whose bits go into this one"},
        },
    )
    actions = {"type": "array", "items": action, "minItems": 1, "maxItems": BITMAP_ACTIONS_MAX}
    bitmaps = {"200": _json(_list_of("bitmaps", "Bitmap"), "the bitmaps that there are")}
    return {
        "/v1/exports/{name}/bitmaps": {
            "parameters": [{"$ref": "#/components/parameters/name"}],
            "get": _operation("bitmaps", "An image's dirty bitmaps.", bitmaps),
            "post": _operation(
                "change_bitmaps",
                "Add, remove, clear, enable, disable and merge bitmaps: all of it in one moment, durably, or nothing.",
                bitmaps,
                body=_object({"actions": actions}),
            ),
        },
    }


def _schemas() -> Json:
    return {**_problem_schemas(), **_export_schemas(), **_client_schemas(), **_part_schemas(), **_server_schemas()}


def _problem_schemas() -> Json:
    return {
        "Problem": {
            "type": "object",
            "required": ["type", "title", "status", "detail"],
            "properties": {
                "type": _STRING,
                "title": _STRING,
                "status": {"type": "integer"},
                "detail": {**_STRING, "description": "one sentence: what was found, what is allowed, where"},
                "problems": {**_STRINGS, "description": "all that is wrong with a body"},
                "image": {**_STRING, "description": "the image file at fault"},
            },
        },
    }


def _export_schemas() -> Json:
    access = _object(
        optional={
            "identities": _STRINGS,
            "networks": _STRINGS,
            "uids": {"type": "array", "items": _COUNT},
            "gids": {"type": "array", "items": _COUNT},
            "read_only": _BOOLEAN,
        }
    )
    return {
        "NewExport": {
            **_object(
                required={"path": {**_STRING, "description": "the image's whole name, from / on"}},
                optional={
                    "name": _STRING,
                    "format": {"enum": list(DRIVERS)},
                    "read_only": _BOOLEAN,
                    "description": _STRING,
                    "min_block_size": _SIZE,
                    "key_file": _STRING,
                    "key_files": {
                        "type": "object",
                        "additionalProperties": _STRING,
                        "description": "by image of the chain, the key file of those that have their own",
                    },
                    "allow_references": _STRINGS,
                    "parent": _STRING,
                    "accept_lost_log": _BOOLEAN,
                    "overlay": {"enum": list(OVERLAY_MODES)},
                    "overlay_dir": _STRING,
                    "tls": _BOOLEAN,
                    "access": {"type": "array", "items": access},
                },
            ),
            "description": "the keys of [[exports]] in a configuration file, with whole file names",
        },
        "Export": _object(
            {
                "name": _STRING,
                "path": _STRING,
                "format": {"enum": list(DRIVERS)},
                "size": {**_COUNT, "description": "bytes that clients see"},
                "is_read_only": _BOOLEAN,
                "description": _STRING,
                "is_snapshot": _BOOLEAN,
                "is_hidden": {**_BOOLEAN, "description": "removed, and open for clients that are still there"},
                "connections": _COUNT,
                "in_flight": {**_COUNT, "description": "requests that are not answered yet"},
                "origin": {"enum": ["config", "live"]},
                "failure": {**_NULLABLE_STRING, "description": "why it takes no writes and no flush any more"},
                "overlay": {"enum": [*OVERLAY_MODES, None], "description": "whether clients get overlays of it"},
                "overlays": {**_COUNT, "description": "overlays that are open"},
                "overlay_names": {**_STRINGS, "description": "of those that are kept, what stands behind the @"},
            }
        ),
    }


def _client_schemas() -> Json:
    return {
        "Client": _object(
            {
                "id": _COUNT,
                "peer": _STRING,
                "export": {**_NULLABLE_STRING, "description": "null: still in its handshake"},
                "overlay": {
                    **_NULLABLE_STRING,
                    "description": "the kept overlay that it has: what stands behind the @",
                },
                "tls": {**_NULLABLE_STRING, "description": "the TLS version; null: plain"},
                "identities": {**_STRINGS, "description": "proven by TLS"},
                "is_read_only": _BOOLEAN,
                "since": {**_SECONDS, "description": "seconds that it has been connected"},
                "in_flight": _COUNT,
            }
        ),
    }


def _part_schemas() -> Json:
    """Of what is inside an image."""
    return {
        "Snapshot": _object(
            {
                "id": _STRING,
                "name": _STRING,
                "size": _COUNT,
                "created_s": {**_SECONDS, "description": "seconds since 1970 UTC"},
                "export": {**_NULLABLE_STRING, "description": "the name that it is exported under"},
            }
        ),
        "Bitmap": _object(
            {
                "name": _STRING,
                "granularity": {**_COUNT, "description": "bytes that a bit stands for"},
                "is_enabled": {**_BOOLEAN, "description": "it follows changes"},
                "is_consistent": {**_BOOLEAN, "description": "false: a crash cost what it knew; it can be removed"},
            }
        ),
    }


def _server_schemas() -> Json:
    return {
        "Status": _object(
            {
                "state": {"enum": ["starting", "serving", "stopping"]},
                "pid": _COUNT,
                "uptime": _SECONDS,
                "exports": _COUNT,
                "failed_exports": {
                    **_STRINGS,
                    "description": "those that take no writes, and those that a reload could not open again",
                },
                "connections": _COUNT,
                "uris": {**_STRINGS, "description": "of each export at each listener; of kept overlays with @NAME"},
            }
        ),
        "Stats": _object({"time": _SECONDS, "exports": {"type": "array", "items": _reference("Counters")}}),
        "Counters": _object(
            {
                "name": _STRING,
                **dict.fromkeys(("connections", "in_flight"), _COUNT),
                **dict.fromkeys(("reads", "writes", "others", "errors", "read_bytes", "write_bytes"), _COUNT),
                **dict.fromkeys(("read_seconds", "write_seconds", "other_seconds"), _SECONDS),
            }
        ),
    }


def _object(required: Json | None = None, optional: Json | None = None) -> Json:
    needed = {"required": list(required)} if required else {}
    properties = {**(required or {}), **(optional or {})}
    return {"type": "object", **needed, "properties": properties, "additionalProperties": False}


def _list_of(key: str, schema: str) -> Json:
    return _object({key: {"type": "array", "items": _reference(schema)}})


def _reference(schema: str) -> Json:
    return {"$ref": f"#/components/schemas/{schema}"}


def _parameter(place: str, name: str, schema: Json, description: str) -> Json:
    return {"in": place, "name": name, "required": place == "path", "schema": schema, "description": description}


def _mode(description: str, modes: Sequence[str]) -> Json:
    return _parameter("query", "mode", {"enum": list(modes), "default": modes[0]}, description)


def _content(media_type: str, schema: Json, description: str) -> Json:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _json(schema: Json, description: str = "as asked", *, has_location: bool = False) -> Json:
    location = {"headers": {"Location": {"schema": _STRING}}} if has_location else {}
    return {**_content(JSON_TYPE, schema, description), **location}


def _operation(
    name: str,
    summary: str,
    responses: Json,
    *,
    parameters: list[Json] | None = None,
    body: Json | None = None,
    is_body_needed: bool = True,
) -> Json:
    given: Json = {} if parameters is None else {"parameters": parameters}
    if body is not None:
        given["requestBody"] = {"required": is_body_needed, "content": {JSON_TYPE: {"schema": body}}}
    return {
        "operationId": name,
        "summary": summary,
        **given,
        "responses": {**responses, "default": {"$ref": "#/components/responses/problem"}},
    }
