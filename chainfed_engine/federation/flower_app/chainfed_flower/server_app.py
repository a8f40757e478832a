"""The server's Flower component: the engine's round loop over a grid, as the app's run configuration says."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from chainfed_engine.federation.deployment import serve_rounds
from chainfed_engine.federation.flower_grid import GridCourier
from chainfed_engine.federation.processes import end_with

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation to its end; what happened is in the run directory."""
    settings = context.run_config
    if int(settings["owner-pid"]):
        end_with(int(settings["owner-pid"]))
    serve_rounds(
        GridCourier(grid),
        config_path=str(settings["config"]),
        out=str(settings["out"]),
        sites=[name.strip() for name in str(settings["sites"]).split(",") if name.strip()],
        resume=bool(settings["resume"]),
        meet_seconds=float(settings["meet-seconds"]),
    )
