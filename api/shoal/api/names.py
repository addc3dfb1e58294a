"""Labels, ports and environment names: where operator, worker, router and people meet.

Labels identify a pod's place in the plan; they never hold state. The revision is the hash of
everything that changes a worker (see `shoal.operator.revision`), so two pods of one revision are
interchangeable.
"""

from typing import Final

GROUP: Final = "serving.shoal.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "InferenceService"

# Labels of everything the operator creates.
LABEL_SERVICE: Final = f"{GROUP}/service"
LABEL_REVISION: Final = f"{GROUP}/revision"
LABEL_REPLICA: Final = f"{GROUP}/replica"  # the group of pods that forms one engine
LABEL_ROLE: Final = f"{GROUP}/role"  # leader | follower | router
LABEL_MEMBER: Final = f"{GROUP}/member"  # place within the group: 0 is the leader
LABEL_GROUP_SIZE: Final = f"{GROUP}/group-size"  # pods of the group
LABEL_ROUTES: Final = f"{GROUP}/routes"  # "true" on the ConfigMaps that routers watch
LABEL_NAME: Final = "app.kubernetes.io/name"
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
LABEL_COMPONENT: Final = "app.kubernetes.io/component"  # worker | router | operator
MANAGER: Final = "shoal-operator"
APP: Final = "shoal"  # value of LABEL_NAME

# Unix seconds from which `drainSeconds` count; on pods that are on their way out.
ANNOTATION_DRAIN_STARTED: Final = f"{GROUP}/drain-started"
# `<revision>:<restarts>` on a pod: what it serves since its weights were swapped, as long as its
# containers have not started anew.
ANNOTATION_SERVES: Final = f"{GROUP}/serves"
# `<revision>:<step>` on a service: the last step of a canary that a person lets pass.
ANNOTATION_PROMOTE: Final = f"{GROUP}/promote"
# Digest of the spec that the operator applied: what it leaves out later has to go.
ANNOTATION_APPLIED: Final = f"{GROUP}/applied"
ROUTES_KEY: Final = "routes.json"  # of a routes ConfigMap's data

ROLE_LEADER: Final = "leader"
ROLE_FOLLOWER: Final = "follower"
ROLE_ROUTER: Final = "router"

# Ports inside a pod. Where pods share one address the environment below overrides them.
PORT_ENGINE_GRPC: Final = 9000
PORT_ENGINE_METRICS: Final = 9001
PORT_ROUTER_HTTP: Final = 8000
PORT_ROUTER_GRPC: Final = 8001

# Environment that a pod's process reads.
ENV_HOST: Final = "SHOAL_HOST"  # address to bind
ENV_PORT: Final = "SHOAL_PORT"  # the engine's gRPC port, or the router's HTTP port
ENV_METRICS_PORT: Final = "SHOAL_METRICS_PORT"
ENV_GRPC_PORT: Final = "SHOAL_GRPC_PORT"  # the router's gRPC port
ENV_POD_NAME: Final = "SHOAL_POD_NAME"
ENV_REVISION: Final = "SHOAL_REVISION"
ENV_CACHE_DIR: Final = "SHOAL_CACHE_DIR"  # downloaded models
ENV_GROUP_SIZE: Final = "SHOAL_GROUP_SIZE"  # pods of the replica
ENV_GROUP_MEMBER: Final = "SHOAL_GROUP_MEMBER"  # this pod's place, 0 is the leader
ENV_LEADER_ADDRESS: Final = "SHOAL_LEADER_ADDRESS"  # DNS name of the leader
ENV_TENSOR_PARALLEL: Final = "SHOAL_TENSOR_PARALLEL"
ENV_PIPELINE_PARALLEL: Final = "SHOAL_PIPELINE_PARALLEL"
ENV_GPUS_PER_NODE: Final = "SHOAL_GPUS_PER_NODE"
ENV_LIFELINE: Final = "SHOAL_LIFELINE"  # "stdin": end when standard input ends (see lifeline)
ENV_LOG_FORMAT: Final = "SHOAL_LOG_FORMAT"  # text | json
# Of a worker, for tests alone: what --inject-step-delay-ms and --inject-failure-rate say.
ENV_INJECT_STEP_DELAY_MS: Final = "SHOAL_INJECT_STEP_DELAY_MS"
ENV_INJECT_FAILURE_RATE: Final = "SHOAL_INJECT_FAILURE_RATE"

NAME_MAX_LENGTH: Final = 40
