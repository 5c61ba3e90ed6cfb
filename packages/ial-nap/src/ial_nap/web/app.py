"""The server of the annotation page: JSON in and out, every verdict on disk and in the model before the answer."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import math
import re
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ial_nap.annotations import Annotation, Disagreement, disagreements, kappa_of_all
from ial_nap.store import AnnotationStore, Round
from ial_nap.web.guard import App, Guard, local_hosts
from ial_nap.web.workbench import Score, View, Workbench
from shared_core.errors import InputError, UnknownKeyError, not_installed

try:
    import uvicorn
    from fastapi import FastAPI, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
except ImportError as error:
    raise not_installed("the annotation page", str(error.name), "ial-nap[web]") from None

__all__ = ["Desk", "create_app", "serve"]

_LIMIT = 1 << 20
_Key = Annotated[str, Field(max_length=64, pattern=r"^[\w-]*$")]
_Name = Annotated[str, Field(min_length=1, max_length=512)]
_Output = Annotated[int | None, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Cell(_Strict):
    """A cell by step, counted from 0, and name of its feature."""

    step: Annotated[int, Field(ge=0)]
    feature: _Name


class Verdict(Cell):
    """A verdict on a cell."""

    verdict: Literal[-1, 0, 1]


class Annotate(_Strict):
    """One action on one instance; `key` lets the page send it again without counting it twice.

    The answer is about `output`, a class or label.
    """

    instance: _Name
    output: _Output = None
    cells: Annotated[list[Verdict], Field(min_length=1, max_length=10_000)]
    seconds: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    note: Annotated[str, Field(max_length=2_000)] = ""
    key: _Key = ""


class WhatIf(_Strict):
    """Cells to ignore."""

    instance: _Name
    output: _Output = None
    cells: Annotated[list[Cell], Field(max_length=10_000)]


class Undo(_Strict):
    """Nothing but a key; the answer is about `output`, where it is about the same instance."""

    output: _Output = None
    key: _Key = ""


class CloseOrRevert(_Strict):
    """What to do with the open round."""

    action: Literal["close", "revert"]
    key: _Key = ""


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _rows(array: np.ndarray[Any, Any], digits: int = 5) -> list[list[float | None]]:
    """Return numbers of a few significant digits: a grid of thousands is sent with every answer."""
    there = np.isfinite(array)
    values = np.where(there, array, 0.0).astype(np.float64)
    places = digits - 1 - np.floor(np.log10(np.abs(values, where=values != 0, out=np.ones_like(values))))
    power = 10.0 ** np.clip(places, -300, 300)
    rows: list[list[float | None]] = (np.round(values * power) / power).tolist()
    for row, column in np.argwhere(~there).tolist():
        rows[row][column] = None
    return rows


class Desk:
    """A model, its log, and those who work on them; one at a time has the model.

    Parameters
    ----------
    workbench : the model
    store : the log; what stands in it is in the model from the start
    count : instances in the queue of a round

    Raises
    ------
    InputError
        For a store that the model cannot obey.
    """

    def __init__(self, workbench: Workbench, store: AnnotationStore, *, count: int = 10) -> None:
        self.workbench, self.store, self.count = workbench, store, count
        self._lock, self._ranking = threading.Lock(), threading.Lock()
        self._seen: dict[tuple[str, str, int], tuple[float, float, float]] = {}
        self._scale = 0.0
        self._places = {name: place for place, name in enumerate(workbench.features)}
        workbench.update([])
        self._untouched = workbench.score()
        self._score, self._applied, self._model = self._untouched, 0, store.context_hash()
        # Resampled scores at the ends of rounds: what a later score is compared with, in pairs.
        self._draws: dict[str, tuple[float, ...]] = {}
        self._agreement: tuple[int, list[Disagreement], float] = (-1, [], math.nan)
        self._sync()

    def _sync(self) -> None:
        if self._applied != self.store.version:
            self.workbench.update(self.store.standing())
            self._score, self._applied = self.workbench.score(), self.store.version
            self._model = self.store.context_hash()

    def _start(self, annotator: str) -> Score:
        """Return the score at the start of the annotator's open round."""
        closed, now = self.store.rounds(annotator), self._untouched
        if not closed or closed[-1].metric != now.metric:
            return now
        last = closed[-1]
        return Score(
            now.metric, now.better, last.value, last.low, last.high, last.before, self._draws.get(last.model, ())
        )

    def _status(self, annotator: str) -> dict[str, Any]:
        score, start = self._score, self._start(annotator)
        change, low, high = score.change(start)
        return {
            "version": self._applied,
            "model": self._model,
            "round": self.store.round(annotator),
            "score": {
                **{name: _number(getattr(score, name)) for name in ("value", "low", "high", "before")},
                "metric": score.metric,
                "better": score.better,
                "start": _number(start.value),
                "gain": {"value": _number(change), "low": _number(low), "high": _number(high)},
                "worse": change < 0,
                "beyond": high < 0 or low > 0,
            },
        }

    def _shown(self, annotator: str, instance: str, view: View) -> dict[str, Any]:
        self._scale = max(self._scale, float(np.abs(view.contributions).max(initial=0.0)))
        self._seen[annotator, instance, view.output] = view.prediction, view.low, view.high
        mine: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for one in self.store.of_instance(instance):
            said = {"step": one.step, "feature": one.feature, "verdict": one.verdict}
            if one.annotator == annotator:
                mine.append({**said, "note": one.note})
            else:
                others.append({**said, "annotator": one.annotator})
        return {
            "instance": instance,
            "values": _rows(view.values, 7),
            "observed": view.observed.tolist(),
            "length": len(self.workbench.steps) if view.length is None else view.length,
            "contributions": _rows(view.contributions),
            "attention": _rows(view.attention),
            "uncertainty": _rows(view.uncertainty),
            "output": view.output,
            "chances": [_number(chance) for chance in view.chances],
            "prediction": _number(view.prediction),
            "low": _number(view.low),
            "high": _number(view.high),
            "label": None if view.label is None else _number(view.label),
            "scale": self._scale,
            "mine": mine,
            "others": others,
            "note": next((one["note"] for one in reversed(mine) if one["note"]), ""),
        }

    def _check(self, output: int | None) -> None:
        if output is not None and output >= len(self.workbench.outputs):
            raise InputError(f"output {output}: there are {len(self.workbench.outputs)}, counted from 0")

    def warm(self, annotators: Iterable[str]) -> None:
        """Rank once before anybody asks, unless everybody's queue is on disk already.

        Parameters
        ----------
        annotators : who will ask
        """
        if any(self.store.queue(name, self.store.round(name)) is None for name in annotators):
            self.workbench.queue(self.count)

    def _queued(self, annotator: str) -> tuple[int, list[dict[str, Any]]]:
        """Return the open round and its queue, ranked now if it is new; others go on working meanwhile."""
        with self._lock:
            self._sync()
            number = self.store.round(annotator)
            kept = self.store.queue(annotator, number)
            judged = {one.instance for one in self.store.standing() if one.annotator == annotator}
        if kept is None:
            with self._ranking:
                found = [asdict(item) for item in self.workbench.queue(self.count, judged)]
            self.store.keep_queue(annotator, number, found)
            # Another tab of the same annotator may have been faster.
            kept = self.store.queue(annotator, number) or found
        return number, kept

    def queue(self, annotator: str) -> dict[str, Any]:
        """Return everything the page starts from: names, the round's queue, progress and score.

        Parameters
        ----------
        annotator : whose
        """
        number, kept = self._queued(annotator)
        with self._lock:
            given: dict[str, int] = {}
            for one in self.store.standing():
                if one.annotator == annotator and one.round == number:
                    given[one.instance] = given.get(one.instance, 0) + 1
            names = zip(self.workbench.features, self.workbench.units, strict=True)
            return {
                "annotator": annotator,
                "kind": self.workbench.kind,
                "outputs": list(self.workbench.outputs),
                "features": [{"name": name, "unit": unit} for name, unit in names],
                "steps": list(self.workbench.steps),
                "items": [{**item, "given": given.get(item["instance"], 0)} for item in kept],
                "seconds": sum(effort.seconds for effort in self.store.efforts() if effort.annotator == annotator),
                **self._status(annotator),
            }

    def instance(self, annotator: str, instance: str, output: int | None = None) -> dict[str, Any]:
        """Return what the model makes of an instance now, and what people said about it.

        Parameters
        ----------
        annotator : who looks
        instance : id
        output : class or label that it is about; None is the likeliest
        """
        self._check(output)
        with self._lock:
            self._sync()
            view = self.workbench.view(instance, output)
            return {**self._shown(annotator, instance, view), **self._status(annotator)}

    def annotate(self, annotator: str, asked: Annotate) -> dict[str, Any]:
        """Write verdicts down, make the model obey, and return what it makes of the instance now.

        Parameters
        ----------
        annotator : who says so
        asked : the verdicts
        """
        self._check(asked.output)
        with self._lock:
            self._sync()
            output = 0 if len(self.workbench.outputs) == 1 else asked.output
            before = None if output is None else self._seen.get((annotator, asked.instance, output))
            if before is None:
                view = self.workbench.view(asked.instance, output)
                output = view.output
                before = self._seen.get((annotator, asked.instance, output), (view.prediction, view.low, view.high))
            model = self._model
            share = asked.seconds / len(asked.cells)
            new = self.store.add(
                [
                    Annotation(
                        asked.instance, cell.step, cell.feature, cell.verdict, share, annotator, 0, model, asked.note
                    )
                    for cell in asked.cells
                ],
                action=asked.key,
            )
            try:
                self._sync()
            except InputError:
                # What the model cannot obey must not stand in its way for ever.
                self.store.undo(annotator)
                self._sync()
                raise
            shown = self._shown(annotator, asked.instance, self.workbench.view(asked.instance, output))
            before_named = dict(zip(("prediction", "low", "high"), map(_number, before), strict=True))
            return {**shown, "saved": len(asked.cells), "new": new, "before": before_named, **self._status(annotator)}

    def what_if(self, asked: WhatIf) -> dict[str, Any]:
        """Return the prediction with some cells ignored; nothing is written.

        Parameters
        ----------
        asked : the cells
        """
        self._check(asked.output)
        cells: list[tuple[int, int]] = []
        for cell in asked.cells:
            if cell.feature not in self._places:
                raise UnknownKeyError(f"feature '{cell.feature}' is not known")
            if cell.step >= len(self.workbench.steps):
                raise InputError(f"step {cell.step}: there are {len(self.workbench.steps)} steps, counted from 0")
            cells.append((cell.step, self._places[cell.feature]))
        with self._lock:
            self._sync()
            found = self.workbench.what_if(asked.instance, cells, asked.output)
        return dict(zip(("prediction", "low", "high"), map(_number, found), strict=True))

    def undo(self, annotator: str, asked: Undo) -> dict[str, Any]:
        """Take the annotator's last action back, and return the instance it was about.

        Parameters
        ----------
        annotator : whose
        asked : with a key
        """
        self._check(asked.output)
        with self._lock:
            gone = self.store.undo(annotator, action=asked.key)
            self._sync()
            shown: dict[str, Any] = {}
            if gone:
                view = self.workbench.view(gone[0].instance, asked.output)
                shown = self._shown(annotator, gone[0].instance, view)
            return {**shown, "undone": len(gone), **self._status(annotator)}

    def round(self, annotator: str, asked: CloseOrRevert) -> dict[str, Any]:
        """Close the annotator's open round, or take all its verdicts back.

        Parameters
        ----------
        annotator : whose
        asked : which of the two
        """
        with self._lock:
            self._sync()
            number, gone = self.store.round(annotator), 0
            if asked.key and self.store.has(annotator, asked.key):
                # The page never saw the answer to its first call.
                pass
            elif asked.action == "revert":
                gone = len(self.store.revert_round(annotator, number, action=asked.key))
                self._sync()
            elif any(one.annotator == annotator and one.round == number for one in self.store.standing()):
                score = self._score
                self.store.close_round(
                    Round(
                        annotator,
                        number,
                        self._model,
                        score.metric,
                        score.better,
                        float(self._start(annotator).value),
                        float(score.value),
                        float(score.low),
                        float(score.high),
                    ),
                    action=asked.key,
                )
                self._draws[self._model] = score.draws
            else:
                raise InputError("this round has no verdict yet; give at least one before closing it")
            return {"undone": gone, **self._status(annotator)}

    def metrics(self, annotator: str) -> dict[str, Any]:
        """Return the score, the rounds, what each annotator has put in, and how far they agree.

        Parameters
        ----------
        annotator : who asks
        """
        with self._lock:
            self._sync()
            if self._agreement[0] != self._applied:
                standing = self.store.standing()
                self._agreement = self._applied, disagreements(standing), kappa_of_all(standing)
            _, split, kappa = self._agreement
            efforts = self.store.efforts()
            return {
                "rounds": [
                    {name: _number(value) if isinstance(value, float) else value for name, value in asdict(one).items()}
                    for one in self.store.rounds()
                ],
                "efforts": [asdict(one) for one in efforts],
                "disagreements": [asdict(one) for one in split[:200]],
                "disagreeing": len(split),
                "kappa": _number(kappa),
                "verdicts": sum(one.verdicts for one in efforts),
                **self._status(annotator),
            }


def _policy(page: str) -> str:
    """Allow the page's own script and style, by their hashes, and nothing from anywhere else."""
    allowed = {
        tag: " ".join(
            "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _line(error: RequestValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{place or 'body'}: {first['msg']}" + (
        "" if len(error.errors()) == 1 else f" (and {len(error.errors()) - 1} more)"
    )


class _Site:
    """The routes."""

    def __init__(self, desk: Desk, annotators: Sequence[str], cookie: str, page: str) -> None:
        self._desk, self._cookie, self._page = desk, cookie, page
        self._tokens = {name: desk.store.token(name) for name in annotators}

    def _who(self, token: str) -> str | None:
        # Every token is compared, in constant time.
        found = [name for name, right in self._tokens.items() if hmac.compare_digest(right.encode(), token.encode())]
        return found[0] if found else None

    def _annotator(self, request: Request) -> str:
        token = request.headers.get("x-token") or request.cookies.get(self._cookie, "")
        found = self._who(token)
        if found is None:
            raise HTTPException(401, "open the annotation page by your own link, the one that ends in ?token=...")
        return found

    def index(self, request: Request) -> Response:
        token = request.query_params.get("token", "")
        if self._who(token):
            answer = HTMLResponse(self._page)
            answer.set_cookie(self._cookie, token, max_age=30 * 86_400, httponly=True, samesite="strict", path="/")
            return answer
        self._annotator(request)
        return HTMLResponse(self._page)

    def queue(self, request: Request) -> Response:
        return JSONResponse(self._desk.queue(self._annotator(request)))

    def instance(self, request: Request, instance: str, output: Annotated[int | None, Query(ge=0)] = None) -> Response:
        return JSONResponse(self._desk.instance(self._annotator(request), instance, output))

    def annotate(self, request: Request, asked: Annotate) -> Response:
        return JSONResponse(self._desk.annotate(self._annotator(request), asked))

    def what_if(self, request: Request, asked: WhatIf) -> Response:
        self._annotator(request)
        return JSONResponse(self._desk.what_if(asked))

    def undo(self, request: Request, asked: Undo) -> Response:
        return JSONResponse(self._desk.undo(self._annotator(request), asked))

    def round(self, request: Request, asked: CloseOrRevert) -> Response:
        return JSONResponse(self._desk.round(self._annotator(request), asked))

    def metrics(self, request: Request) -> Response:
        return JSONResponse(self._desk.metrics(self._annotator(request)))


def _say(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": " ".join(text.split())}, status)


async def _refused(_: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        return _say(422, _line(error))
    if isinstance(error, HTTPException):
        return _say(error.status_code, str(error.detail))
    if isinstance(error, InputError):
        return _say(404 if isinstance(error, UnknownKeyError) else 422, str(error))
    logging.getLogger(__name__).error("a request failed", exc_info=error)
    return _say(
        500, f"a fault of the server ({type(error).__name__}); its log has more, and all saved verdicts are kept"
    )


class _Patient(H11Protocol):
    """Close a connection whose request line and headers do not arrive in time; `Guard` sees to bodies."""

    patience: float
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._calm()

    def _watch(self) -> None:
        # There is none before the first request.
        cycle: RequestResponseCycle | None = getattr(self, "cycle", None)
        if cycle is not None and not cycle.response_complete:
            self._calm()
        elif self._late is None:
            # What drips in does not buy more time.
            self._late = self.loop.call_later(self.patience, self.transport.close)

    def _calm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def create_app(
    workbench: Workbench,
    store: AnnotationStore,
    annotators: Sequence[str],
    *,
    port: int,
    hosts: Iterable[str] = (),
    count: int = 10,
    patience: float = 20.0,
) -> App:
    """Return the annotation page and its JSON API as an ASGI application.

    Parameters
    ----------
    workbench : the model
    store : the log
    annotators : who may come in, each by `AnnotationStore.token`
    port : that it will be reached under
    hosts : names with port other than this machine's own that it may be reached under
    count : instances in the queue of a round
    patience : seconds that a request may take to arrive

    Raises
    ------
    InputError
        For no annotator or one that is there twice, and a store that the model cannot obey.
    """
    if not annotators or len(set(annotators)) < len(annotators) or not all(annotators):
        raise InputError("annotators: name at least one, and each only once")
    page = files("ial_nap.web").joinpath("page.html").read_text("utf-8")
    desk = Desk(workbench, store, count=count)
    desk.warm(annotators)
    site = _Site(desk, annotators, f"ial_nap_{port}", page)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/", site.index, methods=["GET"], response_model=None)
    app.add_api_route("/api/queue", site.queue, methods=["GET"], response_model=None)
    app.add_api_route("/api/instance/{instance:path}", site.instance, methods=["GET"], response_model=None)
    app.add_api_route("/api/annotate", site.annotate, methods=["POST"], response_model=None)
    app.add_api_route("/api/whatif", site.what_if, methods=["POST"], response_model=None)
    app.add_api_route("/api/undo", site.undo, methods=["POST"], response_model=None)
    app.add_api_route("/api/round", site.round, methods=["POST"], response_model=None)
    app.add_api_route("/api/metrics", site.metrics, methods=["GET"], response_model=None)
    for kind in (RequestValidationError, HTTPException, InputError, Exception):
        app.add_exception_handler(kind, _refused)
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
    return Guard(app, (*local_hosts(port), *hosts), limit=_LIMIT, headers=headers.items(), patience=patience)


def serve(
    workbench: Workbench,
    store: AnnotationStore,
    annotators: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    hosts: Iterable[str] = (),
    count: int = 10,
    patience: float = 20.0,
    announce: Callable[[dict[str, str]], None] = lambda _: None,
) -> None:
    """Serve the annotation page until interrupted.

    Parameters
    ----------
    workbench, store, annotators, hosts, count, patience : see `create_app`
    host : address to listen on; other machines get in only with another address here and its name in `hosts`
    port : to listen on; 0 for any that is free
    announce : called with each annotator's own link once the server listens

    Raises
    ------
    InputError
        For a port that is taken, and see `create_app`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small answers without delay only where the socket says that it speaks TCP.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise InputError(f"{host}:{port}: cannot be listened on ({error.strerror}); give another port") from None
        port = int(listener.getsockname()[1])
        app = create_app(workbench, store, annotators, port=port, hosts=hosts, count=count, patience=patience)
        listener.listen(128)
        announce({name: f"http://127.0.0.1:{port}/?token={store.token(name)}" for name in annotators})
        config = uvicorn.Config(
            app,
            http=type("Patient", (_Patient,), {"patience": patience}),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="off",
            timeout_keep_alive=max(1, min(5, int(patience))),
            timeout_graceful_shutdown=3,
        )
        uvicorn.Server(config).run(sockets=[listener])
