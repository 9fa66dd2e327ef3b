"""A small server that speaks OpenAI's chat completions over a real socket, for the tests and benchmarks/judge_speed.py.

python -m tests.judge_server --delay 0.05          # prints its base URL, and says "A" to everything
"""

import argparse
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def verdict(letter, reason="because"):
    return json.dumps({"reason": reason, "verdict": letter})


class JudgeServer:
    """`answer(text, n)`: what to say to the n-th request (from 0) whose last message is `text`: a string is a completion's
    content, a dict its message, (status, body, headers) a response as it stands. `delay`: seconds before that."""

    def __init__(self, answer=lambda text, n: verdict("A"), delay=0.0):
        self.answer, self.delay, self.lock = answer, delay, threading.Lock()
        self.texts, self.bodies, self.keys, self.answered = [], [], [], []
        self.in_flight = self.most_in_flight = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1

            def do_POST(self):
                outer.handle(self)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, request, client_address):
                pass  # a client that was killed or would not wait

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self.lock:
            n = len(self.texts)
            self.texts.append(text)
            self.bodies.append(body | {"path": handler.path})
            self.keys.append(handler.headers["Authorization"])
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            time.sleep(self.delay)
            said = self.answer(text, n)
        finally:
            with self.lock:
                self.in_flight -= 1
        status, headers = 200, {}
        if isinstance(said, tuple):
            status, said, headers = said
        else:
            message = {"role": "assistant"} | ({"content": said} if isinstance(said, str) else said)
            choice = {
                "index": 0,
                "finish_reason": message.pop("finish_reason", "stop"),
                "message": message,
            }
            usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
            said = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [choice],
            }
            said |= {"usage": usage}
        payload = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        with self.lock:
            self.answered += [text] if status == 200 else []
        handler.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(payload))} | headers
        ).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(payload)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0)
    with JudgeServer(delay=parser.parse_args().delay) as server:
        print(server.url, flush=True)
        threading.Event().wait()
