"""The machine, its processes, the screen, files, random draws and errors."""
