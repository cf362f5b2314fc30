"""A server of scores: `vhead serve`. Its parts import FastAPI and uvicorn, which come with `vhead[serve]`."""
