"""Ask the server of warm.py to run a script: `warm_client.py SOCKET script.py ARGUMENT...`; ends with its exit code."""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    request = {"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
    message = json.dumps(request).encode()
    sent = socket.send_fds(connection, [message], [1, 2])
    connection.sendall(message[sent:])
    connection.shutdown(socket.SHUT_WR)
    code = connection.recv(16)
# Nothing comes from a process that was killed.
sys.exit(int(code or 137))
