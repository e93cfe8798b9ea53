"""The calculator as a page: served on this machine (``memopt web``), or written as static files that run the same
Python in the browser through Pyodide (``memopt web --write``, ``make site``).

- :mod:`~memopt.web.settings`: what the form holds, as the flags of the command line;
- :mod:`~memopt.web.api`: what the page may ask, as JSON; the only module that both ways have in common;
- :mod:`~memopt.web.view`: an estimate and plans as the page shows them: every figure of it is worked out here;
- :mod:`~memopt.web.server`: the local server; :mod:`~memopt.web.site`: the static files.

None of it imports torch. The page itself (``page/``) draws and knows no formula.
"""
