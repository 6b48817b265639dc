# The image of every Mailrun process: one binary, whose first argument says what it does.
#
# The build needs BuildKit, the default builder since Docker 23. Cargo's downloads and build results stay in cache
# mounts, so after a change only what changed is compiled.

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# SQL is checked against .sqlx, so no database is needed to build. rust-toolchain.toml asks for tools that are not needed
# here, so the image's own toolchain is named instead.
ENV SQLX_OFFLINE=true \
    RUSTUP_TOOLCHAIN=1.95.0
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/usr/local/cargo/git \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked -p mailrun \
    && install -D --strip target/release/mailrun /out/mailrun

FROM debian:bookworm-slim
# For TLS to a PostgreSQL or RabbitMQ elsewhere.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /out/mailrun /usr/local/bin/mailrun
# A number, so that an orchestrator can see that it is not root.
USER 65532:65532
WORKDIR /
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/mailrun"]
CMD ["--help"]
