"""What runs beside the agent in JavaScript: a hook in the dev server, its plugin, and the client in each page.

No Python here. `hook.mjs` is named by NODE_OPTIONS of the dev server's process and puts `plugin.mjs` into Vite;
`client.mjs` goes into Vite's own client, so every page that Vite serves has it; `screen.mjs` (pure) says what is shown
from what the pages report. `devserver.screen` is the other end.
"""
