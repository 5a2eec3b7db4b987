-- What scripts do with references to blobs: put before every script that says so. `refs` counts a tenant's references to each
-- blob (never 0), `garbage` knows since when nothing refers to one, `sizes` has the bytes of each that counts, and `total`.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Whether a blob cannot be swept before it is referred to.
local function is_held(refs, garbage, sha)
  return redis.call('HEXISTS', refs, sha) == 1 or redis.call('ZSCORE', garbage, sha)
end

-- One reference more; without `bytes` it does not count against the quota.
local function hold(refs, garbage, sizes, sha, bytes)
  redis.call('HINCRBY', refs, sha, 1)
  redis.call('ZREM', garbage, sha)
  if bytes and redis.call('HSETNX', sizes, sha, bytes) == 1 then redis.call('HINCRBY', sizes, 'total', bytes) end
end

-- One reference less; the last one leaves garbage for the sweep.
local function release(refs, garbage, sizes, sha)
  if redis.call('HINCRBY', refs, sha, -1) > 0 then return end
  redis.call('HDEL', refs, sha)
  redis.call('ZADD', garbage, now_ms(), sha)
  local bytes = redis.call('HGET', sizes, sha)
  if not bytes then return end
  redis.call('HDEL', sizes, sha)
  if redis.call('HINCRBY', sizes, 'total', -bytes) <= 0 then redis.call('HDEL', sizes, 'total') end
end

-- {'full', quota, bytes stored, bytes more} when blobs, `words[first]` and its bytes and so on, are over the tenant's quota.
local function over_quota(settings, sizes, words, first)
  local more = 0
  for i = first, #words, 2 do
    if redis.call('HEXISTS', sizes, words[i]) == 0 then more = more + words[i + 1] end
  end
  local record = redis.call('GET', settings)
  local quota = record and cjson.decode(record).quota
  local limit = quota and quota.storage_bytes
  local stored = tonumber(redis.call('HGET', sizes, 'total') or 0)
  if type(limit) ~= 'number' or stored + more <= limit then return false end
  return {'full', string.format('%d', limit), string.format('%d', stored), string.format('%d', more)}
end
