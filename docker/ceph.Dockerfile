# A one-node Ceph cluster that ends with its container. Nothing is kept.
#   docker build --network host -f docker/ceph.Dockerfile -t rbdnbd-ceph .
#   docker run --rm rbdnbd-ceph [memstore|bluestore]
# Ready when it says so; /ceph/ceph.conf is all that a client needs, at the container's address.
FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ceph-mon ceph-osd ceph-common \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb
COPY docker/one-node-ceph.sh /usr/local/bin/
ENTRYPOINT ["sh", "-c", "exec one-node-ceph.sh run /ceph \"$(hostname -i)\" \"$@\"", "--"]
CMD ["memstore"]
