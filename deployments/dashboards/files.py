"""The files of Prometheus and Grafana for one session of Ray.

Templates and dashboards are Ray's own, as its dashboard writes them when it starts; a Ray without a dashboard writes none.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

# As Ray's dashboard calls the data source unless its environment says something else.
PROMETHEUS_NAME = "Prometheus"
OWN_DASHBOARD = Path(__file__).with_name("pensieve.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the two listen, as URLs.

    grafana_for_browsers: under which a browser reaches Grafana; Ray's dashboard embeds its pages from there.
    """

    prometheus: str
    grafana: str
    grafana_for_browsers: str

    def environment(self) -> dict[str, str]:
        """What Ray's dashboard wants to know, in the environment of the head node when Ray is started there."""
        return {
            "RAY_PROMETHEUS_HOST": self.prometheus,
            "RAY_PROMETHEUS_NAME": PROMETHEUS_NAME,
            "RAY_GRAFANA_HOST": self.grafana,
            "RAY_GRAFANA_IFRAME_HOST": self.grafana_for_browsers,
        }

    def exports(self) -> str:
        """The same for a shell."""
        return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.environment().items())


@dataclass(frozen=True, slots=True)
class Files:
    """What was written. folder: all of it."""

    folder: Path

    @property
    def prometheus_config(self) -> Path:
        return self.folder / "prometheus.yml"

    @property
    def prometheus_data(self) -> Path:
        return self.folder / "prometheus_data"

    @property
    def grafana_config(self) -> Path:
        return self.folder / "grafana" / "grafana.ini"

    @property
    def grafana_dashboards(self) -> Path:
        return self.folder / "grafana" / "dashboards"

    @property
    def environment(self) -> Path:
        return self.folder / "ray.env"


def find_discovery(session: Path) -> Path:
    """The list of metrics ports of a session of Ray. Raises ConfigError if there is none."""
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    session = session.resolve()  # session_latest is another folder as soon as another Ray starts
    path: Path = session / PROMETHEUS_SERVICE_DISCOVERY_FILE
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: no Ray runs here whose ports are listed; start pensieve-serve, or Ray with "
            "its dashboard, or name the folder of its session with --session",
            param="session",
        )
    return path


def write_files(discovery: Path, folder: Path, addresses: Addresses, grafana_port: int) -> Files:
    """Write all of it into a folder, over what was written before.

    discovery: the list of metrics ports. Raises ConfigError if it cannot be written.
    """
    from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory
    from ray.dashboard.modules.metrics import templates

    files = Files(folder.absolute())
    provisioning = files.grafana_config.parent / "provisioning"
    dashboards = {
        "default": factory.generate_default_grafana_dashboard,
        "serve": factory.generate_serve_grafana_dashboard,
        "serve_deployment": factory.generate_serve_deployment_grafana_dashboard,
        "serve_llm": factory.generate_serve_llm_grafana_dashboard,
    }
    ini = templates.GRAFANA_INI_TEMPLATE.format(grafana_provisioning_folder=provisioning)
    ini += f"data = {files.folder / 'grafana_data'}\n\n[server]\nhttp_addr = 127.0.0.1\nhttp_port = {grafana_port}\n"
    source = templates.GRAFANA_DATASOURCE_TEMPLATE(
        prometheus_name=PROMETHEUS_NAME, prometheus_host=addresses.prometheus, jsonData={}, secureJsonData={}
    )
    texts = {
        files.prometheus_config: templates.PROMETHEUS_YML_TEMPLATE.format(
            prom_metrics_service_discovery_file_path=discovery
        ),
        files.environment: addresses.exports(),
        files.grafana_config: ini,
        provisioning / "datasources" / "default.yml": source,
        provisioning / "dashboards" / "default.yml": templates.DASHBOARD_PROVISIONING_TEMPLATE.format(
            dashboard_output_folder=files.grafana_dashboards
        ),
    }
    for name, generate in dashboards.items():
        texts[files.grafana_dashboards / f"{name}_grafana_dashboard.json"] = generate()[0]
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        shutil.copy(OWN_DASHBOARD, files.grafana_dashboards / OWN_DASHBOARD.name)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; name another with --output") from error
    return files
