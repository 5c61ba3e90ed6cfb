"""The annotation page: a local server and one page without a build step. Needs the extra ``ial-nap[web]``."""
