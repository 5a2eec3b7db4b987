-- A page of such a list. KEYS: items, order. ARGV: after or '', limit, '1' for newest first.
-- Answers {has more, item...}, or nil when `after` is not in the list.
local rank_of, range = 'ZRANK', 'ZRANGE'
if ARGV[3] == '1' then rank_of, range = 'ZREVRANK', 'ZREVRANGE' end
local first = 0
if ARGV[1] ~= '' then
  local rank = redis.call(rank_of, KEYS[2], ARGV[1])
  if not rank then return false end
  first = rank + 1
end
local last = first + ARGV[2] - 1
local ids = redis.call(range, KEYS[2], first, last)
local answer = {redis.call('ZCARD', KEYS[2]) > last + 1 and 1 or 0}
for _, id in ipairs(ids) do answer[#answer + 1] = redis.call('HGET', KEYS[1], id) end
return answer
