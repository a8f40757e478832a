"""A site's Flower component: hands every message to the site's own process and its answer back. Free of torch.

In and out: `header` bytes in a ConfigRecord, `payload` bytes in an ArrayRecord (see codec.py and transport_flower.py).
The node configuration names the socket of the process that `chainfed join` runs.
"""

import socket

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from chainfed_engine.federation.codec import receive_frame, send_frame
from chainfed_engine.federation.flower_records import from_records, to_records

app = ClientApp()


@app.query()
def answer(message: Message, context: Context) -> Message:
    """One message through the site's process. An exception becomes Flower's own error reply."""
    path = context.node_config.get("socket")
    if not isinstance(path, str):
        raise RuntimeError("node config: expected socket, the path that `chainfed join` prints; start the site with it")
    header, payload = from_records(message.content)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        send_frame(connection, header, payload)
        header, payload = receive_frame(connection)
    return Message(to_records(header, payload), reply_to=message)
