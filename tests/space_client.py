"""A visitor's browser: does in the demo what it is told. Run by path, by the interpreter of the demo's environment.

Standard input holds one JSON job a line, standard output one JSON answer: what the job returns, or `{"error": ...}`.
Each visitor has cookies, storage and pages of their own. The jobs, all with the visitor's name in "who":

    {"do": "open", "url", "width", "dark"}
    {"do": "choose", "field", "files": [{"name", "data": base64}]}       into a field of picker.js
    {"do": "fill", "label", "text"}
    {"do": "select", "label", "option"}
    {"do": "click", "name"}      a button or what a label names
    {"do": "tab", "name"}
    {"do": "press", "name", "answer": selector}      clicks, and waits -> the new answer's text, its HTML, toasts
    {"do": "frame", "selector", "click"}             text of a frame's element; "click" clicks one of the frame's first
    {"do": "evaluate", "code"}
    {"do": "seen"}                                   requests, errors of the console, bodies of answers, the whole page
    {"do": "close"}
"""

import base64
import json
import re
import sys
from typing import Any

from playwright.sync_api import Page, Response, sync_playwright

answers, sys.stdout = sys.stdout, sys.stderr
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
TOAST = "[data-testid=toast-body]"
SECONDS = 1000


# Keeps what the page's streams bring.
LISTEN = """
window.told = [];
async function listen(url, body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let part; !(part = await reader.read()).done; ) window.told.push([url, part.value]);
  } catch {} // the page left it
}
const fetched = window.fetch;
window.fetch = async (...asked) => {
  const response = await fetched(...asked);
  if (!response.url.includes("/heartbeat/")) listen(response.url, response.clone().body);
  return response;
};
const Source = window.EventSource;
window.EventSource = class extends Source {
  constructor(...asked) {
    super(...asked);
    this.addEventListener("message", (event) => window.told.push([this.url, event.data]));
  }
};
"""


class Visitor:
    def __init__(self, page: Page) -> None:
        page.add_init_script(LISTEN)
        self.page = page
        self.responses: list[Response] = []
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.set_default_timeout(40 * SECONDS)
        page.on("request", lambda request: self.requests.append(f"{request.method} {request.url}"))
        page.on("response", lambda response: self.responses.append(response))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def open(self, url: str) -> dict:
        self.page.goto(url)
        self.page.wait_for_selector(".af-picker[data-started]")
        return {"text": self.page.inner_text("body")}

    def choose(self, field: str, files: list[dict]) -> dict:
        payloads: list[Any] = [
            {"name": file["name"], "mimeType": "image/jpeg", "buffer": base64.b64decode(file["data"])} for file in files
        ]
        self.page.set_input_files(f".af-picker[data-name={field}] input", payloads)
        return {}

    def fill(self, label: str, text: str) -> dict:
        self.page.get_by_label(label, exact=True).fill(text)
        return {}

    def select(self, label: str, option: str) -> dict:
        self.page.get_by_label(label, exact=True).click()
        self.page.get_by_role("option", name=option, exact=True).click()
        return {}

    def tab(self, name: str) -> dict:
        self.page.get_by_role("tab", name=name).click()
        return {}

    def click(self, name: str) -> dict:
        button = self.page.get_by_role(
            "button", name=re.compile(rf"^{re.escape(name)}(\W|$)")
        )  # an accordion's has an arrow
        (button if button.count() else self.page.get_by_label(name, exact=True)).click()
        return {}

    def press(self, name: str, answer: str) -> dict:
        page = self.page
        page.evaluate(f"document.querySelectorAll('{answer} .af').forEach(e => e.classList.add('old'))")
        self.click(name)
        page.wait_for_selector(f"{answer} .af:not(.old)", state="attached")
        page.wait_for_timeout(200)
        toasts = page.locator(TOAST).all_inner_texts()
        for close in page.locator(f"{TOAST} button").all():
            close.click()
        page.locator(TOAST).first.wait_for(state="detached")
        return {"text": page.inner_text(answer), "html": page.inner_html(answer), "toasts": toasts}

    def frame(self, selector: str, click: str | None = None) -> dict:
        frame = self.page.frame_locator("iframe.af-look")
        if click:
            frame.locator(click).click()
        return {"text": frame.locator(selector).inner_text()}

    def evaluate(self, code: str) -> dict:
        return {"value": self.page.evaluate(code)}

    def seen(self) -> dict:
        bodies: dict[str, str] = {}
        for response in self.responses:
            bodies[response.url] = f"{response.status} {response.headers} "
            if not response.url.startswith(("data:", "blob:")) and "text/event-stream" not in bodies[response.url]:
                bodies[response.url] += response.body().decode("latin-1")
        for url, text in self.page.evaluate("window.told"):  # the browser keeps no body of a stream
            bodies[url] = bodies.get(url, "") + text
        return {"requests": self.requests, "errors": self.errors, "bodies": bodies, "page": self.page.content()}

    def close(self) -> dict:
        self.page.context.close()
        return {}


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        visitors: dict[str, Visitor] = {}
        for line in sys.stdin:
            job = json.loads(line)
            verb, who = job.pop("do"), job.pop("who")
            try:
                if verb == "open":
                    size: Any = {"width": job.pop("width", 1280), "height": 900}
                    scheme: Any = "dark" if job.pop("dark", False) else "light"
                    context = browser.new_context(viewport=size, color_scheme=scheme)
                    visitors[who] = Visitor(context.new_page())
                found = getattr(visitors[who], verb)(**job)
            except Exception as error:
                found = {"error": f"{verb}: {type(error).__name__}: {error}"}
            print(json.dumps(found), file=answers, flush=True)
        browser.close()


main()
